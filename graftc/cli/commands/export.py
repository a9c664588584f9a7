"""``graftc export``: write an artifact's model for deployment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer
from annotated_types import Ge

from graftc.cli.command import CommandRun, command
from graftc.cli.fold_output import print_certificate, print_files, print_tensors
from graftc.cli.options import (
    AllowUnchanged,
    ArtifactArgument,
    BaseChoice,
    BaseFormOption,
    BaseOption,
    Budget,
    FormatOption,
    require_packed,
)
from graftc.records.certificate import Certificate
from graftc.records.fields import ArtifactFolder
from graftc.records.files import PeftTensor
from graftc.records.results import WrittenResult
from graftc.runtime.export.formats.gguf import DTYPE, ENGINE
from graftc.runtime.export.formats.onnx_adapter import GRAPH, SLOT
from graftc.runtime.export.formats.peft import MAX_RANK, SERVER
from graftc.runtime.export.graph_options import INPUTS
from graftc.specs.errors.diagnostics import GraftError
from graftc.specs.errors.text import listed

if TYPE_CHECKING:
    from rich.console import Console

    from graftc.compiler.folding.requantise import BaseForm
    from graftc.runtime.compiled import Compiled
    from graftc.runtime.deploy.merged import Merged
    from graftc.runtime.deploy.partial import Partial
    from graftc.runtime.export.exporter import Exporter
    from graftc.runtime.export.exporting import Exporting


@dataclass(frozen=True, kw_only=True)
class ExportResult(
    WrittenResult,
    published="ExportResult",
    unstated=("title", "needs"),
    behind={"format": ("out", "dry_run"), "merged": ("files",), "max_rank": ("warnings",)},
):
    """`graftc export DIR --format FORMAT --out PATH --json`."""

    artifact: ArtifactFolder

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
    """The title of the list of tensors, for people; empty where there are none."""

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
            help="Fold the adaptations into the weights (the default), or leave them in the graph.",
            show_default=False,
        ),
    ] = None,
    inputs: Annotated[
        list[str] | None,
        typer.Option(
            INPUTS.flag,
            metavar="NAME",
            help=f"{INPUTS.meaning}; may be repeated. All others must fold, unless --no-merge is given.",
            show_default=False,
        ),
    ] = None,
    budget: Budget = None,
    allow_unchanged: AllowUnchanged = False,
    base: BaseFormOption = None,
    dtype: Annotated[
        str | None,
        typer.Option(DTYPE.flag, metavar="TYPE", help=DTYPE.help, show_default=False),
    ] = None,
    server: Annotated[
        str | None,
        typer.Option(
            SERVER.flag,
            metavar="ENGINE",
            help=f"Write what a serving engine reads, or refuse: {listed([*SERVER.words, *ENGINE.words], 'or')}.",
            show_default=False,
        ),
    ] = None,
    max_rank: Annotated[
        int | None,
        typer.Option(MAX_RANK.flag, metavar="N", min=1, help=MAX_RANK.help, show_default=False),
    ] = None,
    graph: Annotated[
        str | None,
        typer.Option(GRAPH.flag, metavar="PATH", help=GRAPH.help, show_default=False),
    ] = None,
    slot: Annotated[
        str | None,
        typer.Option(SLOT.flag, metavar="NAME", help=SLOT.help, show_default=False),
    ] = None,
    option: Annotated[
        list[str] | None,
        typer.Option(
            "--option",
            metavar="NAME=VALUE",
            help="Another option of the format; may be repeated.",
            show_default=False,
        ),
    ] = None,
) -> ExportResult:
    """Export to ONNX (onnx-generate: with a cache, for generation), .pt2 or GGUF, folded and certified, or only the
    adapters to PEFT's format, for an ONNX graph (onnx-adapter) or (--no-merge) to GGUF. Files are checked before they
    are put in place.
    """
    from graftc.runtime.export.options import options_for
    from graftc.runtime.export.registry import exporter_of

    exporter = exporter_of(str(format))
    given = {"inputs": inputs, "dtype": dtype, "server": server, "max_rank": max_rank, "graph": graph, "slot": slot}
    given |= _named(option or ())
    of_fold = {"--budget": budget, "--base": base, "--allow-unchanged": allow_unchanged}
    asked = _check_options(exporter, given, of_fold, merge)
    folds = exporter.folds and merge is not False
    options = exporter.defaults | options_for(exporter, given)
    names = options.get("inputs") or ()
    if run.out is not None:
        with exporter.reported():
            run.beside = tuple(exporter.companions(run.out, options))
            run.require_destination(directory, model, replaceable=exporter.replaceable)
    run.step("loading")
    from graftc.runtime.api import load
    from graftc.runtime.export.exporting import ready_export

    compiled = load(directory, model)
    require_packed(base, compiled.compilation.store.packed)
    if names:
        from graftc.runtime.export.inputs import require_known

        require_known(compiled, names)
        folds = folds and _anything_folds(compiled, names, asked)
    if folds:
        run.step("folding and certifying")
    deployed = _folded(compiled, budget, names, base, allow_unchanged) if folds else compiled.eval()
    run.step("exporting")
    ready = ready_export(_exporting(deployed), exporter, given, run.out, force=run.force)
    if run.out is not None:
        ready.write(force=run.force)
    return ExportResult(
        artifact=str(directory),
        format=exporter.name,
        merged=folds,
        certificate=deployed.certificate if folds else None,
        tensors=tuple(ready.adapters.tensors),
        max_rank=ready.adapters.max_rank,
        title=ready.adapters.title,
        needs=ready.adapters.needs,
    )


@export.shows
def _show(result: ExportResult, to: Console) -> None:
    print_certificate(result.certificate, {}, to)
    if result.title:
        print_tensors(result.title, result.tensors, to, result.needs)
    print_files(result.out, result.files, to)


_FLAGS = {option.name: option.flag for option in (INPUTS, DTYPE, SERVER, MAX_RANK, GRAPH, SLOT)}
"""The command's own flags for options of built-in formats, by option name."""


def _named(options: Sequence[str]) -> dict[str, str]:
    """Return the values of the options given as ``NAME=VALUE``, by name.

    Raises:
        GraftError: GC090 for a text that does not have this form, or an option that has its own flag.
    """
    named = {}
    for text in options:
        name, equals, named[name] = text.partition("=")
        if not equals or name in _FLAGS:
            hint = f"write {_FLAGS.get(name, '--option NAME=VALUE')}"
            raise GraftError("GC090", f"--option {text} is not valid", hint=hint)
    return named


def _check_options(
    exporter: Exporter, given: Mapping[str, Any], of_fold: Mapping[str, Any], merge: bool | None
) -> list[str]:
    """Check that every option has an effect on the format, and return the flags that concern folding.

    Args:
        exporter: the exporter for the requested format.
        given: the values of the export options, by name.
        of_fold: the values of the folding options, by flag.
        merge: whether folding was requested; None if neither ``--merge`` nor ``--no-merge`` was given.

    Raises:
        GraftError: GC090 for an option without effect.
    """
    from graftc.runtime.export.options import misplaced

    for name, hint in misplaced(exporter, given):
        word = _FLAGS.get(name, f"--option {name}")
        raise GraftError("GC090", f"{word} does not apply to --format {exporter.name}", hint=hint)
    folding = [word for word, value in {**of_fold, "--merge": merge is True}.items() if value not in (None, False)]
    if folding and not exporter.folds:
        message = f"{folding[0]} does not apply to --format {exporter.name}"
        raise GraftError("GC090", message, hint="leave it out: nothing is folded")
    if folding and merge is False:
        message = f"{folding[0]} applies to folding, but with --no-merge nothing is folded"
        raise GraftError("GC090", message, hint="leave one of them out")
    if given["max_rank"] is not None and given["server"] is None:
        raise GraftError(
            "GC090", "--max-rank is a server's limit, but no server is named", hint="for example --for vllm"
        )
    return folding


def _anything_folds(compiled: Compiled, inputs: Sequence[str], asked: Sequence[str]) -> bool:
    """Return whether there is anything to fold beside the adaptations that become inputs.

    Args:
        compiled: the model.
        inputs: names of these adaptations.
        asked: the flags given that concern folding.

    Raises:
        GraftError: GC050 for an adaptation that does not fold and is not an input, GC090 if nothing folds although a
            flag concerns folding.
    """
    from graftc.compiler.folding.fold_plan import fold_plan

    plan = fold_plan(compiled.compilation)
    composed = {composition.name for composition in compiled.compilation.spec.compose}
    for name, reason in plan.reasons().items():
        if name not in inputs and name not in composed:
            raise GraftError("GC050", reason, hint=f"make it an input with --inputs {name}, or use --no-merge")
    if asked and not plan.names:
        hint = "leave it out: the adaptations become inputs, and no other one is there"
        raise GraftError("GC090", f"{asked[0]} applies to folding, but nothing folds", hint=hint)
    return bool(plan.names)


def _exporting(model: Compiled | Merged | Partial) -> Exporting:
    """Return the object that exports the model."""
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
    """Fold the adaptations into the weights, except those that become inputs. Raises: as `Compiled.merge`."""
    form = cast("BaseForm | None", base)
    if not inputs:
        return compiled.merge(budget=budget, base=form, allow_unchanged=allow_unchanged)
    from graftc.runtime.deploy.partial import merge_what_folds

    return merge_what_folds(compiled, budget, base=form, allow_unchanged=allow_unchanged)
