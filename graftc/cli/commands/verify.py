"""``graftc verify``: recompute and check the statements that an artifact makes about itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from graftc.cli import completion
from graftc.cli.command import CommandRun, command
from graftc.cli.options import SealedArgument
from graftc.records.fields import ArtifactFolder
from graftc.records.results import CommandResult
from graftc.records.verification import Check

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True, kw_only=True)
class VerifyResult(CommandResult, behind={"checks": ("warnings",)}):
    """`graftc verify DIR --json`. The exit status is 1 where it did not pass."""

    artifact: ArtifactFolder

    passed: bool
    """Whether every check that was done holds."""

    checks: tuple[Check, ...]
    """The checks, in the order they were done."""


@command()
def verify(
    run: CommandRun,
    directory: SealedArgument,
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
            help="Check a merged folder against its base and this adapter (an artifact or a PEFT folder) by folding "
            "every site again, file by file.",
            show_default=False,
        ),
    ] = None,
    signed_by: Annotated[
        Path | None,
        typer.Option(
            "--signed-by",
            metavar="KEYS",
            help="Require a signature by one of these public keys: a .pub file of OpenSSH, or several lines of such.",
            show_default=False,
        ),
    ] = None,
    signature: Annotated[
        Path | None,
        typer.Option(
            "--signature",
            metavar="FILE",
            help="The signature, if it is not beside the folder; with --signed-by.",
            show_default=False,
        ),
    ] = None,
    files_only: Annotated[
        bool, typer.Option("--files-only", help="Check the files only; the base is not needed.")
    ] = False,
) -> VerifyResult:
    """Recompute an artifact's hashes, base, sites, graphs and certificate, or the sources of a merged folder."""
    _check_options(directory, model, adapter, files_only)
    signed = _signed(directory, signed_by, signature)
    if any(check.passed is False for check in signed):
        run.status = 1
        return VerifyResult(artifact=str(directory), passed=False, checks=signed)
    if adapter is None:
        from graftc.runtime.loading.verify import verify as verify_folder

        verification = verify_folder(directory, model, files_only=files_only, step=run.step)
    else:
        from graftc.cli.output import throughput
        from graftc.runtime.streaming.verifying import verify_checkpoint

        advance = throughput(run.step, "folding and comparing")
        verification = verify_checkpoint(directory, adapter, model, progress=advance)
    run.status = 0 if verification.passed else 1
    return VerifyResult(artifact=str(directory), passed=verification.passed, checks=(*signed, *verification.checks))


def _signed(directory: Path, keys: Path | None, signature: Path | None) -> tuple[Check, ...]:
    """Return the check of the signature, which comes before everything else; nothing if no key is named.

    Raises:
        GraftError: GC061, GC080 or GC094 as in `signature_problem`; GC090 for a signature without keys.
    """
    from graftc.specs.errors.diagnostics import GraftError

    if keys is None:
        if signature is not None:
            raise GraftError("GC090", "--signature has no effect without --signed-by", hint="name the signer's key")
        return ()
    from graftc.runtime.artifact.signatures import signature_problem

    problem, signer = signature_problem(directory, keys, signature)
    return (Check("signature", not problem, problem or f"signed by {signer}"),)


def _check_options(directory: Path, model: str | None, adapter: Path | None, files_only: bool) -> None:
    """Check that every option has an effect.

    Raises:
        GraftError: GC090 for an option without effect.
    """
    from graftc.runtime.artifact.places import is_artifact, is_merged
    from graftc.specs.errors.diagnostics import GraftError

    other = "--model" if model is not None else "--adapter"
    if files_only and (model, adapter) != (None, None):
        raise GraftError(
            "GC090", f"--files-only reads neither base nor adapter, but {other} is given", hint="leave one out"
        )
    if model is not None and adapter is None and is_merged(directory) and not is_artifact(directory):
        message = f"--model has no effect: {directory} is a merged model, which is compared with a base only by folding"
        raise GraftError("GC090", message, hint="add --adapter ADAPTER, or leave out --model")


@verify.shows
def _show(result: VerifyResult, to: Console) -> None:
    from graftc.cli.output import print_table

    words = {True: "passed", False: "FAILED", None: "-"}
    print_table(to, ("check", "", "found"), [(c.name, words[c.passed], c.detail) for c in result.checks])
    to.print()
    to.print(f"{result.artifact}: {_verdict(result.checks)}", soft_wrap=True, markup=False)


def _verdict(checks: Sequence[Check]) -> str:
    failed = next((check.name for check in checks if check.passed is False), None)
    if failed is None:
        return "verified"
    return "NOT verified: its base is missing or different" if failed == "base" else "NOT as it was written"
