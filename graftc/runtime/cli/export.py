"""``graftc export``: write an artifact's model for deployment."""

from __future__ import annotations

from typing import Annotated

import typer

from graftc.runtime.cli.options import (
    ArtifactArgument,
    BaseOption,
    Budget,
    DryRun,
    Force,
    FormatOption,
    Json,
    Out,
    destination,
)

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
    budget: Budget = None,
    dry_run: DryRun = False,
    force: Force = False,
    json: Json = False,
) -> None:
    """Export to ONNX or .pt2, folded and certified; the file is checked before it appears."""
    from graftc.runtime.cli.output import print_json, steps, working

    to = destination(out, dry_run=dry_run)
    companions = () if to is None else (f"{to.name}.data",)
    with working(json) as warnings, steps(json) as step:
        from graftc.runtime.files import check_destination

        if to is not None:
            check_destination(to, force=force, companions=companions)
        step("loading")
        from graftc.runtime.api import load

        compiled = load(directory, model)
        step("folding and certifying" if merge else "exporting")
        merged = compiled.merge(budget) if merge else None
        if to is not None:
            step("exporting")
            (merged or compiled.eval()).export(to, format=format.value, force=force)

    from graftc.runtime.cli.deployed import files_in, print_certificate, print_files

    files = files_in(to, companions)
    certificate = merged.certificate if merged is not None else None
    if json:
        from graftc.runtime.cli.results import ExportResult

        result = {
            **{"artifact": str(directory), "format": format.value, "out": None if to is None else str(to)},
            **{"dry_run": dry_run, "merged": merge, "files": files},
            **{"certificate": certificate.to_json() if certificate else None, "warnings": warnings},
        }
        print_json(ExportResult.model_validate(result))
        return
    print_certificate(certificate, {})
    print_files(to, files)
