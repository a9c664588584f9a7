"""``graftc merge``: fold an artifact's adaptations into its base and write the result."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from graftc.cli.command import CommandRun, command
from graftc.cli.fold_output import print_certificate, print_files
from graftc.cli.options import (
    AllowUnchanged,
    ArtifactArgument,
    BaseChoice,
    BaseFormOption,
    BaseOption,
    Budget,
    DType,
    DTypeOption,
    require_packed,
)
from graftc.records.certificate import Certificate
from graftc.records.fields import ArtifactFolder
from graftc.records.merging import Streamed, Unfolded
from graftc.records.results import WrittenResult

if TYPE_CHECKING:
    import torch
    from rich.console import Console


@dataclass(frozen=True, kw_only=True)
class MergeResult(
    WrittenResult, published="MergeResult", behind={"artifact": ("out", "dry_run"), "streamed": ("files", "warnings")}
):
    """`graftc merge DIR --out DIR2 --json`."""

    artifact: ArtifactFolder

    out: str | None = None
    """The written folder: a transformers model, or an artifact where the merge is partial; null with `--dry-run`."""

    partial: bool
    """Whether some adaptations stay beside the base."""

    folded: tuple[str, ...]
    """Names of the adaptations that were folded into the base."""

    kept: tuple[Unfolded, ...] = ()
    """The adaptations that stay, with the reason."""

    certificate: Certificate | None
    """The evidence for the fold; null where nothing folds."""

    streamed: Streamed | None = None
    """Further facts about a merge file by file; null for one in memory."""


@command(writes=True)
def merge(
    run: CommandRun,
    directory: ArtifactArgument,
    model: BaseOption = None,
    budget: Budget = None,
    partial: Annotated[
        bool,
        typer.Option(
            "--partial",
            help="Fold what folds; if something remains, write an artifact together with its new base.",
        ),
    ] = False,
    stream: Annotated[
        bool,
        typer.Option(
            "--stream",
            help="Merge file by file, without capturing or loading the model; the base must be a safetensors folder. "
            "PEFT adapters are always merged in this way.",
        ),
    ] = False,
    dtype: DTypeOption = None,
    base: BaseFormOption = None,
    allow_unchanged: AllowUnchanged = False,
) -> MergeResult:
    """Fold, certify, and write a folder that transformers loads. If something does not fold, the error names it."""
    from graftc.runtime.artifact.places import is_ours, is_peft

    if stream or is_peft(directory):
        _require_files_alone({"--partial": partial, "--budget": budget, "--base": base})
        return _merge_files(run, directory, model, dtype, allow_unchanged)
    run.require_destination(directory, model, replaceable=is_ours)
    run.step("loading")
    from graftc.cli.output import time_left
    from graftc.runtime.api import load
    from graftc.runtime.deploy.partial import merge_what_folds
    from graftc.runtime.interop.transformers import packed_again

    compiled = load(directory, model)
    require_packed(base, compiled.compilation.store.packed)
    if base is BaseChoice.REQUANTIZED and run.out is not None:
        raise packed_again()
    advance = time_left(run.step, "folding and certifying")
    options: Any = {"dtype": _element_type(dtype), "base": base, "allow_unchanged": allow_unchanged}
    if partial:
        merged = merge_what_folds(compiled, budget, advance, **options)
    else:
        merged = compiled.merge(budget=budget, progress=advance, **options)
    if run.out is not None:
        run.step("writing")
        merged.save(run.out, force=run.force)
    return MergeResult(
        artifact=str(directory),
        partial=bool(merged.kept),
        folded=tuple(merged.folded),
        kept=tuple(Unfolded(name, reason) for name, reason in merged.kept.items()),
        certificate=merged.certificate,
    )


@merge.shows
def _show(result: MergeResult, to: Console) -> None:
    from graftc.cli.output import number

    print_certificate(result.certificate, {each.name: each.reason for each in result.kept}, to)
    if (streamed := result.streamed) is not None:
        files = streamed.resumed_files
        resumed = f"; {number(files)} files were already done" if files else ""
        to.print(f"{'untouched:':<22}{number(streamed.untouched_tensors)} tensors, bit for bit{resumed}", markup=False)
    print_files(result.out, result.files, to)


def _require_files_alone(options: Mapping[str, object]) -> None:
    """Check that no option needs the model, which is not loaded. ``options`` are values by flag.

    Raises:
        GraftError: GC090 for such an option.
    """
    from graftc.specs.errors.diagnostics import GraftError

    for option in (option for option, value in options.items() if value not in (None, False)):
        message = f"{option} needs the model, which a file-by-file merge does not load"
        raise GraftError("GC090", message, hint=f"leave out {option}, or --stream")


def _merge_files(
    run: CommandRun, directory: Path, model: str | None, dtype: DType | None, allow_unchanged: bool
) -> MergeResult:
    """Merge file by file, without loading the model."""
    from graftc.cli.output import throughput

    run.step("reading")
    from graftc.runtime.streaming.merging import merge_checkpoint

    merged = merge_checkpoint(
        directory,
        model,
        run.out,
        dtype=_element_type(dtype),
        allow_unchanged=allow_unchanged,
        force=run.force,
        progress=throughput(run.step, "merging"),
    )
    return MergeResult(
        artifact=str(directory),
        partial=False,
        folded=tuple(merged.folded),
        certificate=merged.certificate,
        streamed=Streamed(merged.untouched, merged.resumed),
    )


def _element_type(dtype: DType | None) -> torch.dtype | None:
    import torch

    return None if dtype is None else {DType.FLOAT32: torch.float32}[dtype]
