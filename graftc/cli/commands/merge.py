"""``graftc merge``: fold an artifact's adaptations into its base and write the result."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from graftc.cli.options import (
    AllowUnchanged,
    ArtifactArgument,
    BaseFormOption,
    BaseOption,
    Budget,
    DryRun,
    DType,
    DTypeOption,
    Force,
    Json,
    Out,
    destination,
)

if TYPE_CHECKING:
    import torch

__all__ = ["merge"]


def merge(
    directory: ArtifactArgument,
    out: Out = None,
    model: BaseOption = None,
    budget: Budget = None,
    partial: Annotated[
        bool,
        typer.Option(
            "--partial",
            help="Fold what can be folded; if something remains, write an artifact together with its new base.",
        ),
    ] = False,
    stream: Annotated[
        bool,
        typer.Option(
            "--stream",
            help="Merge file by file, without capturing or loading the model; the base is a folder of safetensors. "
            "Adapters of PEFT are always merged in this way.",
        ),
    ] = False,
    dtype: DTypeOption = None,
    base: BaseFormOption = None,
    allow_unchanged: AllowUnchanged = False,
    dry_run: DryRun = False,
    force: Force = False,
    json: Json = False,
) -> None:
    """Fold, certify, and write a folder that transformers loads. What cannot be folded is named in the error."""
    from graftc.cli.output import print_json, steps, time_left, working
    from graftc.runtime.artifact.places import is_ours, is_peft

    to = destination(out, dry_run=dry_run)
    if stream or is_peft(directory):
        _require_files_alone(partial, budget)
        chosen = {"dtype": _element_type(dtype), "allow_unchanged": allow_unchanged, "force": force}
        _merge_files(directory, to, model, chosen, json)
        return
    with working(json) as warnings, steps(json) as step:
        from graftc.files.writing import check_apart, check_destination

        if to is not None:
            check_apart(to, directory, model)
            check_destination(to, force=force, replaceable=is_ours)
        step("loading")
        from graftc.runtime.api import load
        from graftc.runtime.deploy.partial import merge_what_folds

        compiled = load(directory, model)
        advance = time_left(step, "folding and certifying")
        options: Any = {"dtype": _element_type(dtype), "base": base, "allow_unchanged": allow_unchanged}
        if partial:
            merged = merge_what_folds(compiled, budget, advance, **options)
        else:
            merged = compiled.merge(budget=budget, progress=advance, **options)
        if to is not None:
            step("writing")
            merged.save(to, force=force)

    from graftc.cli.deployed import files_in, print_certificate, print_files

    files = files_in(to)
    if json:
        from graftc.cli.results import MergeResult

        result = {
            **{"artifact": str(directory), "out": None if to is None else str(to), "dry_run": dry_run},
            **{"partial": bool(merged.kept), "folded": list(merged.folded), "files": files},
            "kept": [{"name": name, "reason": reason} for name, reason in merged.kept.items()],
            **{"certificate": merged.certificate.to_json(), "streamed": None, "warnings": warnings},
        }
        print_json(MergeResult.model_validate(result))
        return
    print_certificate(merged.certificate, merged.kept)
    print_files(to, files)


def _require_files_alone(partial: bool, budget: float | None) -> None:
    """Raise for options that need the model, which is not loaded.

    Raises:
        GraftError: GC090.
    """
    from graftc.specs.errors.diagnostics import GraftError

    if partial or budget is not None:
        option = "--partial" if partial else "--budget"
        message = f"{option} needs the model, which is not loaded here"
        raise GraftError("GC090", message, hint=f"leave out {option}, or --stream")


def _merge_files(
    directory: Path,
    to: Path | None,
    model: str | None,
    options: Mapping[str, Any],
    json: bool,
) -> None:
    """Merge file by file, without loading the model, and print the result."""
    from graftc.cli.output import print_json, steps, throughput, working

    with working(json) as warnings, steps(json) as step:
        step("reading")
        from graftc.runtime.streaming.merging import merge_checkpoint

        merged = merge_checkpoint(directory, model, to, progress=throughput(step, "merging"), **options)

    from graftc.cli.deployed import files_in, print_certificate, print_files

    files = files_in(to)
    if json:
        from graftc.cli.results import MergeResult

        result = {
            **{"artifact": str(directory), "out": None if to is None else str(to), "dry_run": to is None},
            **{"partial": False, "folded": list(merged.folded), "kept": [], "files": files},
            "certificate": merged.certificate.to_json(),
            "streamed": {"untouched_tensors": merged.untouched, "resumed_files": merged.resumed},
            "warnings": warnings,
        }
        print_json(MergeResult.model_validate(result))
        return
    print_certificate(merged.certificate, {})
    from graftc.cli.output import console, number

    resumed = f"; {number(merged.resumed)} files were done already" if merged.resumed else ""
    console().print(f"{'untouched:':<22}{number(merged.untouched)} tensors, bit for bit{resumed}", markup=False)
    print_files(to, files)


def _element_type(dtype: DType | None) -> torch.dtype | None:
    import torch

    return None if dtype is None else {DType.FLOAT32: torch.float32}[dtype]
