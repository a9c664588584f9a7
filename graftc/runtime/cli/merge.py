"""``graftc merge``: fold an artifact's adaptations into its base and write the result."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from graftc.runtime.cli.options import (
    AllowUnchanged,
    ArtifactArgument,
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
    dtype: DTypeOption = None,
    allow_unchanged: AllowUnchanged = False,
    dry_run: DryRun = False,
    force: Force = False,
    json: Json = False,
) -> None:
    """Fold, certify, and write a folder that transformers loads. What cannot be folded is named in the error."""
    from graftc.runtime.cli.output import print_json, steps, time_left, working

    to = destination(out, dry_run=dry_run)
    with working(json) as warnings, steps(json) as step:
        from graftc.runtime.artifact.places import is_ours
        from graftc.runtime.files import check_apart, check_destination

        if to is not None:
            check_apart(to, directory, model)
            check_destination(to, force=force, replaceable=is_ours)
        step("loading")
        from graftc.runtime.api import load
        from graftc.runtime.deploy.partial import merge_what_folds

        compiled = load(directory, model)
        advance = time_left(step, "folding and certifying")
        options: Any = {"dtype": _element_type(dtype), "allow_unchanged": allow_unchanged}
        if partial:
            made = merge_what_folds(compiled, budget, advance, **options)
        else:
            made = compiled.merge(budget, progress=advance, **options)
        if to is not None:
            step("writing")
            made.save(to, force=force)

    from graftc.runtime.cli.deployed import files_in, print_certificate, print_files

    files = files_in(to)
    if json:
        from graftc.runtime.cli.results import MergeResult

        result = {
            **{"artifact": str(directory), "out": None if to is None else str(to), "dry_run": dry_run},
            **{"partial": bool(made.kept), "folded": list(made.folded), "files": files},
            "kept": [{"name": name, "reason": reason} for name, reason in made.kept.items()],
            **{"certificate": made.certificate.to_json(), "warnings": warnings},
        }
        print_json(MergeResult.model_validate(result))
        return
    print_certificate(made.certificate, made.kept)
    print_files(to, files)


def _element_type(dtype: DType | None) -> torch.dtype | None:
    import torch

    return None if dtype is None else {DType.FLOAT32: torch.float32}[dtype]
