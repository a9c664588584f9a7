"""``graftc export``: write an artifact's model for deployment."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, cast

import typer

from graftc.runtime.cli.options import (
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

if TYPE_CHECKING:
    from graftc.compiler.folding.requantise import BaseForm
    from graftc.runtime.compiled import Compiled
    from graftc.runtime.deploy.merged import Merged
    from graftc.runtime.deploy.partial import Partial

__all__ = ["export"]


def export(
    directory: ArtifactArgument,
    format: FormatOption,
    out: Out = None,
    model: BaseOption = None,
    merge: Annotated[
        bool,
        typer.Option("--merge/--no-merge", help="Fold the adaptations into the weights, or leave them in the graph."),
    ] = True,
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
        str, typer.Option("--dtype", metavar="TYPE", help="Type of the matrices in a GGUF file: f32, f16 or bf16.")
    ] = "f32",
    server: Annotated[
        str | None,
        typer.Option(
            "--for",
            metavar="SERVER",
            help="Check a PEFT folder against the limits of a server: vllm or sglang.",
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
    alone to PEFT's format or (--no-merge) to GGUF; files are checked before they appear."""
    from graftc.runtime.cli.output import print_json, steps, working

    if format is ExportFormat.GGUF and inputs:
        raise GraftError(
            "GC090", "a GGUF file has no inputs", hint="--no-merge writes the LoRAs as a file of their own"
        )
    if format is ExportFormat.ONNX_GENERATE and inputs:
        raise GraftError("GC090", "graphs that generate take no adaptations as inputs", hint="leave out --inputs")
    to = destination(out, dry_run=dry_run)
    names = inputs or []
    if format is ExportFormat.PEFT:
        _to_peft(directory, to, model, names, budget, server, max_rank, force=force, json=json)
        return
    if server is not None or max_rank is not None:
        raise GraftError("GC090", "--for and --max-rank are about PEFT's folders", hint="add --format peft")
    companions = () if to is None else (f"{to.name}.data", *(f"{to.name}.{name}.safetensors" for name in names))
    with working(json) as warnings, steps(json) as step:
        from graftc.runtime.files import check_apart, check_destination

        if to is not None:
            check_apart(to, directory, model)
            if format is ExportFormat.ONNX_GENERATE:
                from graftc.runtime.export.cached import is_exported

                check_destination(to, force=force, replaceable=is_exported)
            else:
                check_destination(to, force=force, companions=companions)
        step("loading")
        from graftc.runtime.api import load

        compiled = load(directory, model)
        if names:
            from graftc.runtime.export.inputs import require_known

            require_known(compiled, names)
        step("folding and certifying" if merge else "exporting")
        merged = _folded(compiled, budget, names, base, allow_unchanged) if merge else None
        if to is not None:
            step("exporting")
            _write(merged or compiled.eval(), to, format, names, dtype, force=force)

    from graftc.runtime.cli.deployed import files_in, print_certificate, print_files

    files = files_in(to, companions)
    certificate = merged.certificate if merged is not None else None
    if json:
        from graftc.runtime.cli.results import ExportResult

        result = {
            **{"artifact": str(directory), "format": format.value, "out": None if to is None else str(to)},
            **{"dry_run": dry_run, "merged": merge, "files": files},
            **{"certificate": certificate.to_json() if certificate else None, "tensors": []},
            **{"max_rank": None, "warnings": warnings},
        }
        print_json(ExportResult.model_validate(result))
        return
    print_certificate(certificate, {})
    print_files(to, files)


def _write(
    made: Compiled | Merged | Partial, to: Path, format: ExportFormat, names: Sequence[str], dtype: str, *, force: bool
) -> None:
    from graftc.runtime.deploy.partial import Partial

    if format is ExportFormat.GGUF and not isinstance(made, Partial):
        made.export(to, format="gguf", dtype=cast("Literal['f32', 'f16', 'bf16']", dtype), force=force)
        return
    if format is ExportFormat.ONNX_GENERATE:
        made.export(to, format="onnx-generate", force=force)
        return
    kind: Literal["onnx", "pt2"] = "onnx" if format is ExportFormat.ONNX else "pt2"
    made.export(to, format=kind, inputs=names, force=force)


def _to_peft(
    directory: Path,
    to: Path | None,
    model: str | None,
    names: Sequence[str],
    budget: float | None,
    server: str | None,
    max_rank: int | None,
    *,
    force: bool,
    json: bool,
) -> None:
    """Write the adapters as PEFT's checkpoint; nothing is folded.

    Raises:
        GraftError: GC090 for options that are about graphs.
    """
    from graftc.runtime.cli.output import print_json, steps, working

    if names or budget is not None:
        option = "--inputs" if names else "--budget"
        raise GraftError("GC090", f"{option} is not for --format peft", hint="leave it out: nothing is folded")
    if max_rank is not None and server is None:
        raise GraftError("GC090", "--max-rank is a limit of a server", hint="name it: --for vllm or --for sglang")
    with working(json) as warnings, steps(json) as step:
        from graftc.runtime.files import check_apart, check_destination
        from graftc.runtime.interop.peft.exporting import export_peft, is_exported, prepared
        from graftc.runtime.interop.peft.servers import require_served, server_of

        limits = None if server is None else server_of(server)
        if to is not None:
            check_apart(to, directory, model)
            check_destination(to, force=force, replaceable=is_exported)
        step("loading")
        from graftc.runtime.api import load
        from graftc.runtime.deploy.deployed import deployed
        from graftc.runtime.model.runner import runner_of

        compilation = deployed(runner_of(load(directory, model))).compilation
        step("exporting")
        made = prepared(compilation)
        needed = None if limits is None else require_served(limits, made.config, made.tensors, max_rank=max_rank)
        if to is not None:
            export_peft(compilation, to, force=force)

    from graftc.runtime.cli.deployed import files_in, print_files, print_tensors
    from graftc.runtime.cli.output import console

    files = files_in(to)
    if json:
        from graftc.runtime.cli.results import ExportResult

        result = {
            **{"artifact": str(directory), "format": "peft", "out": None if to is None else str(to)},
            **{"dry_run": to is None, "merged": False, "files": files, "certificate": None},
            **{"tensors": made.sites(), "max_rank": needed, "warnings": warnings},
        }
        print_json(ExportResult.model_validate(result))
        return
    print_tensors(str(made.config["peft_type"]), made.sites())
    if limits is not None:
        console().print(f"{'the server needs:':<22}{limits.option} {needed}", markup=False)
    print_files(to, files)


def _folded(
    compiled: Compiled,
    budget: float | None,
    inputs: Sequence[str],
    base: BaseChoice | None,
    allow_unchanged: bool,
) -> Merged | Partial:
    """What folds in the weights; of the rest nothing but what the inputs name.

    Raises:
        GraftError: GC050 for what does not fold and is no input; as `Compiled.merge`.
    """
    form = cast("BaseForm | None", base)
    if not inputs:
        return compiled.merge(budget=budget, base=form, allow_unchanged=allow_unchanged)
    from graftc.runtime.deploy.partial import merge_what_folds

    made = merge_what_folds(compiled, budget, base=form, allow_unchanged=allow_unchanged)
    composed = {composition.name for composition in compiled.compilation.spec.compose}
    for name, reason in made.kept.items():
        if name not in inputs and name not in composed:
            raise GraftError("GC050", reason, hint=f"name it with --inputs {name}, or fold nothing with --no-merge")
    return made
