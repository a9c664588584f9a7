"""``graftc compile``: compile a spec against a model and write an artifact."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated

import typer

from graftc.cli.command import CommandRun, command
from graftc.cli.fold_output import print_certificate, print_files
from graftc.cli.options import Certify, ModelOption, Seed, SpecArgument
from graftc.cli.reports import CheckedReport, checked, print_report
from graftc.records.certificate import Certificate
from graftc.records.fields import FOLDS, BaseFingerprint, NothingWritten, Unfolded, WrittenArtifact
from graftc.records.files import WrittenFile

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True, kw_only=True)
class CompileResult(CheckedReport, unstated=("kept",)):
    """`graftc compile SPEC --model MODEL --out DIR --json`."""

    out: WrittenArtifact = None

    dry_run: NothingWritten = False

    files: tuple[WrittenFile, ...] = ()
    """The artifact's files; with `--dry-run`, none."""

    fingerprint: BaseFingerprint

    certificate: Annotated[Certificate | None, FOLDS]

    kept: Unfolded = field(default_factory=dict)


@command(writes=True)
def compile(
    run: CommandRun,
    spec: SpecArgument,
    model: ModelOption,
    seed: Seed = None,
    certify: Certify = True,
    full: Annotated[
        bool, typer.Option("--full", help="Identify the base by all of its values, not by a sample from each tensor.")
    ] = False,
) -> CompileResult:
    """Compile a spec against a model and write an artifact: adapters, graphs, sites, and a reference to the base."""
    from graftc.specs.io import early_spec

    # Parse before torch is imported, so that a misspelt field is reported at once.
    loaded_spec = early_spec(spec)
    if run.out is not None:
        from graftc.runtime.artifact.places import is_artifact

        run.require_destination(spec, model, replaceable=is_artifact)
    run.step("loading the model")

    from graftc.runtime.api import compile as compile_spec
    from graftc.runtime.artifact.write import ArtifactEvidence, save
    from graftc.runtime.deploy.merged import certificate_of
    from graftc.runtime.sources.models import load_model_and_inputs

    started = time.perf_counter()
    loaded, inputs = load_model_and_inputs(model)
    seconds = time.perf_counter() - started
    run.step("compiling")
    compiled = compile_spec(loaded_spec, loaded, inputs, seed=seed)
    run.step("certifying")
    certificate, kept = certificate_of(compiled) if certify else (None, {})
    if run.out is None:
        fingerprint = compiled.compilation.identity(full=full).fingerprint
    else:
        run.step("writing")
        evidence = ArtifactEvidence(certificate, kept, model, full)
        fingerprint = save(compiled, run.out, evidence, force=run.force).base.fingerprint
    return CompileResult(
        **checked(compiled.report, spec, model, loaded, seconds),
        fingerprint=fingerprint,
        certificate=certificate,
        kept=kept,
    )


@compile.shows
def _show(result: CompileResult, to: Console) -> None:
    print_report(result, to)
    print_certificate(result.certificate, result.kept, to)
    print_files(result.out, result.files, to)
