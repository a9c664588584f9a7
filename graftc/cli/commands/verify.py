"""``graftc verify``: recompute what an artifact states about itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from graftc.cli import completion
from graftc.cli.options import ArtifactArgument, Json

if TYPE_CHECKING:
    from graftc.runtime.loading.verify import Verification

__all__ = ["verify"]


def verify(
    directory: ArtifactArgument,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "--base",
            "-m",
            metavar="MODEL",
            help="The base, if it is not the one that the artifact names.",
            show_default=False,
            autocompletion=completion.models,
        ),
    ] = None,
    adapter: Annotated[
        Path | None,
        typer.Option(
            "--adapter",
            metavar="ADAPTER",
            help="Hold a merged folder against its base and this adapter, an artifact or a folder of PEFT: every site "
            "is folded again, file by file.",
            show_default=False,
        ),
    ] = None,
    files_only: Annotated[
        bool, typer.Option("--files-only", help="Check the files only; the base is not needed.")
    ] = False,
    json: Json = False,
) -> None:
    """Recompute an artifact's hashes, base, sites, graphs and certificate, or what a merged folder was made of."""
    from graftc.cli.output import console, print_json, print_table, steps, working

    with working(json) as warnings, steps(json) as step:
        if adapter is not None:
            verification = _against_adapter(directory, adapter, model, step)
        else:
            from graftc.runtime.loading.verify import verify as verify_folder

            verification = verify_folder(directory, model, files_only=files_only, step=step)
    if json:
        from graftc.cli.results import VerifyResult

        checks = [{"name": c.name, "passed": c.passed, "detail": c.detail} for c in verification.checks]
        result = {"artifact": str(directory), "passed": verification.passed, "checks": checks, "warnings": warnings}
        print_json(VerifyResult.model_validate(result))
    else:
        to = console()
        words = {True: "passed", False: "FAILED", None: "-"}
        print_table(to, ("check", "", "found"), [(c.name, words[c.passed], c.detail) for c in verification.checks])
        to.print()
        to.print(f"{directory}: {_verdict(verification)}", soft_wrap=True, markup=False)
    if not verification.passed:
        raise typer.Exit(1)


def _against_adapter(directory: Path, adapter: Path, model: str | None, step: Callable[[str], None]) -> Verification:
    from graftc.cli.output import throughput
    from graftc.runtime.streaming.verifying import verify_checkpoint

    return verify_checkpoint(directory, adapter, model, progress=throughput(step, "folding and comparing"))


def _verdict(verification: Verification) -> str:
    failed = next((check.name for check in verification.checks if check.passed is False), None)
    if failed is None:
        return "verified"
    return "NOT verified: its base is not here, or is another" if failed == "base" else "NOT as it was written"
