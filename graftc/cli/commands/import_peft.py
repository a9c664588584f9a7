"""``graftc import-peft``: read PEFT checkpoints and write an artifact."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from graftc.cli.command import CommandRun, command
from graftc.cli.fold_output import print_certificate, print_files, print_tensors
from graftc.cli.options import Certify, ModelOption
from graftc.records.certificate import Certificate
from graftc.records.fields import FOLDS, Unfolded, WrittenArtifact
from graftc.records.files import PeftTensor, WrittenFile
from graftc.records.results import WrittenResult

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True, kw_only=True)
class ImportPeftResult(
    WrittenResult,
    published="ImportPeftResult",
    unstated=("kept",),
    behind={"model": ("out", "dry_run"), "tensors": ("files",), "certificate": ("warnings",)},
):
    """`graftc import-peft DIR... --model MODEL --out DIR2 --json`."""

    adapters: tuple[str, ...]
    """The checkpoints' folders."""

    peft_types: tuple[str, ...]
    """PEFT's name of the method of each."""

    methods: tuple[str, ...]
    """The method that says the same here, of each."""

    model: str
    """The base, as given."""

    out: WrittenArtifact = None

    tensors: tuple[PeftTensor, ...]
    """Every tensor of the checkpoints that was taken over, and what it is here."""

    files: tuple[WrittenFile, ...] = ()
    """The artifact's files."""

    certificate: Annotated[Certificate | None, FOLDS]

    kept: Unfolded = field(default_factory=dict)


@command(writes=True)
def import_peft(
    run: CommandRun,
    directories: Annotated[
        list[Path],
        typer.Argument(
            metavar="DIR...",
            help="Folders that PEFT's save_pretrained wrote; if several, each adaptation is named after its folder.",
            show_default=False,
        ),
    ],
    model: ModelOption,
    name: Annotated[
        str | None,
        typer.Option(
            "--name",
            metavar="NAME",
            help="An adapter in a subfolder, where PEFT writes every adapter that is not named default.",
            show_default=False,
        ),
    ] = None,
    certify: Certify = True,
) -> ImportPeftResult:
    """Read PEFT checkpoints and write an artifact; every tensor must have its place in the model."""
    from graftc.runtime.artifact.places import is_artifact
    from graftc.runtime.interop.peft.folder import read_peft

    for directory in directories:
        run.require_destination(directory, model, replaceable=is_artifact)
    single = len(directories) == 1
    adapters = [read_peft(directory, name if single else None) for directory in directories]
    run.step("loading the model")
    from graftc.runtime.api import import_peft as import_from
    from graftc.runtime.artifact.write import ArtifactEvidence, save
    from graftc.runtime.deploy.merged import certificate_of
    from graftc.runtime.interop.peft.expert_layouts import pairs_in
    from graftc.runtime.interop.peft.pairs import peft_tensors
    from graftc.runtime.interop.peft.several import names_of
    from graftc.runtime.model.runner import runner_of
    from graftc.runtime.offered.adapters import Adapters
    from graftc.runtime.sources.models import load_model_and_inputs

    loaded, inputs = load_model_and_inputs(model)
    run.step("compiling")
    compiled = import_from(directories[0] if single else directories, loaded, inputs, name=name)
    run.step("certifying")
    certificate, kept = certificate_of(compiled) if certify else (None, {})
    if run.out is not None:
        run.step("writing")
        save(compiled, run.out, ArtifactEvidence(certificate, kept, model), force=run.force)
    alone = [compiled] if single else Adapters(runner_of(compiled)).each_alone(names_of(directories))
    pairs = (pairs_in(given, part.compilation) for given, part in zip(adapters, alone, strict=True))
    return ImportPeftResult(
        adapters=tuple(map(str, directories)),
        peft_types=tuple(given.config.peft_type for given in adapters),
        methods=tuple(str(given.config.format[0].tag()) for given in adapters),
        model=model,
        tensors=peft_tensors(dict.fromkeys(pair for group in pairs for pair in group)),
        certificate=certificate,
        kept=kept,
    )


@import_peft.shows
def _show(result: ImportPeftResult, to: Console) -> None:
    methods = zip(result.peft_types, result.methods, strict=True)
    print_tensors(", ".join(f"{kind} as {method}" for kind, method in methods), result.tensors, to)
    print_certificate(result.certificate, result.kept, to)
    print_files(result.out, result.files, to)
