"""``graftc export``: write an artifact's model for deployment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from graftc.cli.options import (
    AllowUnchanged,
    ArtifactArgument,
    BaseChoice,
    BaseFormOption,
    BaseOption,
    Budget,
    DryRun,
    ExportFormat,
    Force,
    FormatOption,
    Json,
    Out,
    destination,
)
from graftc.specs.errors.diagnostics import GraftError
from graftc.specs.options.exports import ExportOption, misplaced

if TYPE_CHECKING:
    from graftc.compiler.folding.requantise import BaseForm
    from graftc.runtime.compiled import Compiled
    from graftc.runtime.deploy.merged import Merged
    from graftc.runtime.deploy.partial import Partial
    from graftc.runtime.export.exporting import Exporting

__all__ = ["export"]


def export(
    directory: ArtifactArgument,
    format: FormatOption,
    out: Out = None,
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
    dry_run: DryRun = False,
    force: Force = False,
    json: Json = False,
) -> None:
    """Export to ONNX (onnx-generate: with a cache, to generate), .pt2 or GGUF, folded and certified, or the adapters
    alone to PEFT's format or (--no-merge) to GGUF; files are checked before they appear.
    """
    from graftc.cli.output import print_json, steps, working

    names = inputs or []
    of_format = {"--inputs": names, "--dtype": dtype, "--for": server, "--max-rank": max_rank}
    of_fold = {"--budget": budget, "--base": base, "--allow-unchanged": allow_unchanged}
    _check_options(format, of_format, of_fold, merge)
    to = destination(out, dry_run=dry_run)
    options: dict[str, Any] = {_OPTIONS[word]: value for word, value in of_format.items()}
    with working(json) as warnings, steps(json) as step:
        from graftc.files.writing import check_apart, check_destination
        from graftc.runtime.export.exporters import EXPORTERS

        exporter = EXPORTERS[format.value]
        folds = exporter.folds and merge is not False
        companions = () if to is None else exporter.companions(to, names)
        exporter.check(options)
        if to is not None:
            check_apart(to, directory, model)
            check_destination(to, force=force, companions=companions, replaceable=exporter.replaceable)
        step("loading")
        from graftc.runtime.api import load

        compiled = load(directory, model)
        if names:
            from graftc.runtime.export.inputs import require_known

            require_known(compiled, names)
        if folds:
            step("folding and certifying")
        deployed = _folded(compiled, budget, names, base, allow_unchanged) if folds else compiled.eval()
        step("exporting")
        from graftc.runtime.export.exporting import ready_export

        ready = ready_export(_exporting(deployed), format.value, options)
        if to is not None:
            ready.write(to, force)

    from graftc.cli.deployed import files_in, print_certificate, print_files, print_tensors

    files = files_in(to, companions)
    certificate = deployed.certificate if folds else None
    if json:
        from graftc.cli.results import ExportResult

        result = {
            **{"artifact": str(directory), "format": format.value, "out": None if to is None else str(to)},
            **{"dry_run": dry_run, "merged": folds, "files": files},
            **{"certificate": certificate.to_json() if certificate else None, "tensors": ready.tensors},
            **{"max_rank": ready.max_rank, "warnings": warnings},
        }
        print_json(ExportResult.model_validate(result))
        return
    print_certificate(certificate, {})
    if ready.title:
        print_tensors(ready.title, ready.tensors, ready.needs)
    print_files(to, files)


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
