"""``graftc export``: write an artifact's model for deployment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer
from annotated_types import Ge

from graftc.cli.command import CommandRun, command
from graftc.cli.options import (
    AllowUnchanged,
    ArtifactArgument,
    BaseChoice,
    BaseFormOption,
    BaseOption,
    Budget,
    ExportFormat,
    FormatOption,
)
from graftc.cli.printing import print_certificate, print_files, print_tensors
from graftc.records.certificate import Certificate
from graftc.records.files import PeftTensor
from graftc.records.results import WrittenResult
from graftc.specs.errors.diagnostics import GraftError
from graftc.specs.options.exports import ExportOption, misplaced

if TYPE_CHECKING:
    from rich.console import Console

    from graftc.compiler.folding.requantise import BaseForm
    from graftc.runtime.compiled import Compiled
    from graftc.runtime.deploy.merged import Merged
    from graftc.runtime.deploy.partial import Partial
    from graftc.runtime.export.exporting import Exporting


@dataclass(frozen=True, kw_only=True)
class ExportResult(
    WrittenResult,
    published="ExportResult",
    unstated=("title", "needs"),
    behind={"format": ("out", "dry_run"), "merged": ("files",), "max_rank": ("warnings",)},
):
    """`graftc export DIR --format FORMAT --out PATH --json`."""

    artifact: str
    """The artifact's folder."""

    format: str
    """The format."""

    out: str | None = None
    """The file that was written; null with `--dry-run`."""

    merged: bool
    """Whether the adaptations were folded first."""

    certificate: Certificate | None
    """The evidence for the fold; null where nothing was folded."""

    tensors: tuple[PeftTensor, ...]
    """With `--format peft`, every tensor that was written, and what it is here; empty otherwise."""

    max_rank: Annotated[int | None, Ge(1)]
    """With `--for`, the largest rank with which the server has to be started, its `--max-lora-rank`; null otherwise."""

    title: str = ""
    """What stands above the tensors, for people; empty where there are none."""

    needs: str | None = None
    """The option that the server needs, for people."""


@command(writes=True)
def export(
    run: CommandRun,
    directory: ArtifactArgument,
    format: FormatOption,
    model: BaseOption = None,
    merge: Annotated[
        bool | None,
        typer.Option(
            "--merge/--no-merge",
            help="Fold the adaptations into the weights, which is the default, or leave them in the graph.",
            show_default=False,
        ),
    ] = None,
    inputs: Annotated[
        list[str] | None,
        typer.Option(
            "--inputs",
            metavar="NAME",
            help="An adaptation whose tensors become inputs of the graph, with their values in a file beside it; may "
            "be repeated. All others have to fold, unless nothing does (--no-merge).",
            show_default=False,
        ),
    ] = None,
    budget: Budget = None,
    allow_unchanged: AllowUnchanged = False,
    base: BaseFormOption = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            "--dtype",
            metavar="TYPE",
            help="Type of the matrices in a GGUF file: f32, which is the default, f16 or bf16.",
            show_default=False,
        ),
    ] = None,
    server: Annotated[
        str | None,
        typer.Option(
            "--for",
            metavar="SERVER",
            help="Write a PEFT folder as a server reads it right, within its limits: vllm, sglang or mistralrs.",
            show_default=False,
        ),
    ] = None,
    max_rank: Annotated[
        int | None,
        typer.Option(
            "--max-rank",
            metavar="N",
            min=1,
            help="The largest rank that the server was started with.",
            show_default=False,
        ),
    ] = None,
) -> ExportResult:
    """Export to ONNX (onnx-generate: with a cache, to generate), .pt2 or GGUF, folded and certified, or the adapters
    alone to PEFT's format or (--no-merge) to GGUF; files are checked before they appear.
    """
    from graftc.runtime.export.exporters import EXPORTERS

    names = inputs or []
    of_format = {"--inputs": names, "--dtype": dtype, "--for": server, "--max-rank": max_rank}
    of_fold = {"--budget": budget, "--base": base, "--allow-unchanged": allow_unchanged}
    _check_options(format, of_format, of_fold, merge)
    options: dict[str, Any] = {_OPTIONS[word]: value for word, value in of_format.items()}
    exporter = EXPORTERS[format.value]
    folds = exporter.folds and merge is not False
    run.beside = () if run.out is None else exporter.companions(run.out, names)
    exporter.check(options)
    run.require_destination(directory, model, replaceable=exporter.replaceable)
    run.step("loading")
    from graftc.runtime.api import load
    from graftc.runtime.export.exporting import ready_export

    compiled = load(directory, model)
    if names:
        from graftc.runtime.export.inputs import require_known

        require_known(compiled, names)
    if folds:
        run.step("folding and certifying")
    deployed = _folded(compiled, budget, names, base, allow_unchanged) if folds else compiled.eval()
    run.step("exporting")
    ready = ready_export(_exporting(deployed), format.value, options)
    if run.out is not None:
        ready.write(run.out, run.force)
    return ExportResult(
        artifact=str(directory),
        format=format.value,
        merged=folds,
        certificate=deployed.certificate if folds else None,
        tensors=tuple(ready.tensors),
        max_rank=ready.max_rank,
        title=ready.title,
        needs=ready.needs,
    )


@export.shows
def _show(result: ExportResult, to: Console) -> None:
    print_certificate(result.certificate, {}, to)
    if result.title:
        print_tensors(result.title, result.tensors, to, result.needs)
    print_files(result.out, result.files, to)


_OPTIONS: Mapping[str, ExportOption] = MappingProxyType(
    {"--inputs": "inputs", "--dtype": "dtype", "--for": "server", "--max-rank": "max_rank"}
)
"""The options of exports, by the command's options for them."""


def _check_options(
    format: ExportFormat, of_format: Mapping[str, Any], of_fold: Mapping[str, Any], merge: bool | None
) -> None:
    """Raise if an option would have no effect.

    Args:
        format: the format to write.
        of_format: the values of the options of exports, by option.
        of_fold: the values of the options of folding, by option.
        merge: whether folding was requested; None if neither option was given.

    Raises:
        GraftError: GC090.
    """
    words = {option: word for word, option in _OPTIONS.items()}
    given: dict[str, Any] = {_OPTIONS[word]: value for word, value in of_format.items()}
    for option, hint in misplaced(format.value, given):
        raise GraftError("GC090", f"{words[option]} is not for --format {format.value}", hint=hint)  # type: ignore[index]
    folding = [word for word, value in {**of_fold, "--merge": merge is True}.items() if value not in (None, False)]
    if folding and format is ExportFormat.PEFT:
        message = f"{folding[0]} is not for --format peft"
        raise GraftError("GC090", message, hint="leave it out: nothing is folded")
    if folding and merge is False:
        message = f"{folding[0]} is about folding, and with --no-merge nothing is folded"
        raise GraftError("GC090", message, hint="leave one of them out")
    if given["max_rank"] is not None and given["server"] is None:
        raise GraftError("GC090", "--max-rank is a limit of a server", hint="name it, as in --for vllm")


def _exporting(model: Compiled | Merged | Partial) -> Exporting:
    """Return the object that exports a model."""
    from graftc.runtime.deploy.partial import Partial
    from graftc.runtime.export.exporting import Exporting
    from graftc.runtime.model.adapted import AdaptedRunner
    from graftc.runtime.model.runner import runner_of

    runner = model if isinstance(model, Partial) else runner_of(model)
    return Exporting(runner) if isinstance(runner, AdaptedRunner) else runner.exporting


def _folded(
    compiled: Compiled,
    budget: float | None,
    inputs: Sequence[str],
    base: BaseChoice | None,
    allow_unchanged: bool,
) -> Merged | Partial:
    """Fold the adaptations into the weights, except those that become inputs.

    Raises:
        GraftError: GC050 for an adaptation that does not fold and is not an input; otherwise as `Compiled.merge`.
    """
    form = cast("BaseForm | None", base)
    if not inputs:
        return compiled.merge(budget=budget, base=form, allow_unchanged=allow_unchanged)
    from graftc.runtime.deploy.partial import merge_what_folds

    partial = merge_what_folds(compiled, budget, base=form, allow_unchanged=allow_unchanged)
    composed = {composition.name for composition in compiled.compilation.spec.compose}
    for name, reason in partial.kept.items():
        if name not in inputs and name not in composed:
            raise GraftError("GC050", reason, hint=f"name it with --inputs {name}, or fold nothing with --no-merge")
    return partial
