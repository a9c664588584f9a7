"""``graftc verify``: recompute what an artifact states about itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from graftc.runtime.cli.options import ArtifactArgument, BaseOption, Json

if TYPE_CHECKING:
    from graftc.runtime.loading.verify import Verification

__all__ = ["verify"]


def verify(
    directory: ArtifactArgument,
    model: BaseOption = None,
    files_only: Annotated[
        bool, typer.Option("--files-only", help="Check the files only; the base is not needed.")
    ] = False,
    json: Json = False,
) -> None:
    """Recompute an artifact's hashes, base, sites, graphs and certificate, or the hashes of a merged folder."""
    from graftc.runtime.cli.output import console, print_json, print_table, steps, working

    with working(json) as warnings, steps(json) as step:
        from graftc.runtime.loading.verify import verify as verify_folder

        found = verify_folder(directory, model, files_only=files_only, step=step)
    if json:
        from graftc.runtime.cli.results import VerifyResult

        checks = [{"name": c.name, "passed": c.passed, "detail": c.detail} for c in found.checks]
        result = {"artifact": str(directory), "passed": found.passed, "checks": checks, "warnings": warnings}
        print_json(VerifyResult.model_validate(result))
    else:
        to = console()
        words = {True: "passed", False: "FAILED", None: "-"}
        print_table(to, ("check", "", "found"), [(c.name, words[c.passed], c.detail) for c in found.checks])
        to.print()
        to.print(f"{directory}: {_verdict(found)}", soft_wrap=True, markup=False)
    if not found.passed:
        raise typer.Exit(1)


def _verdict(found: Verification) -> str:
    failed = next((check.name for check in found.checks if check.passed is False), None)
    if failed is None:
        return "verified"
    return "NOT verified: its base is not here, or is another" if failed == "base" else "NOT as it was written"
