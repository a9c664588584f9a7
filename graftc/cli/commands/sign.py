"""``graftc sign``: sign an artifact or a merged folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from graftc.cli.command import CommandRun, command
from graftc.cli.options import SealedArgument
from graftc.records.fields import ArtifactFolder
from graftc.records.results import CommandResult

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True, kw_only=True)
class SignResult(CommandResult):
    """`graftc sign DIR --json`."""

    artifact: ArtifactFolder

    signature: str
    """The file that was written, a DSSE envelope."""

    signer: str
    """Fingerprint of the key, as `ssh-keygen -lf` prints it."""

    file: str
    """The file of the folder that lists all others, with their digests."""

    sha256: str
    """SHA-256 of that file, which the signature covers."""


@command()
def sign(
    run: CommandRun,
    directory: SealedArgument,
    key: Annotated[
        Path,
        typer.Option(
            "--key",
            "-k",
            metavar="KEY",
            help="An Ed25519 or ECDSA private key in OpenSSH's or in PEM format. The passphrase of an encrypted one is "
            "asked for, or read from GRAFTC_PASSPHRASE.",
            show_default=False,
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            metavar="FILE",
            help="Where to write, outside the folder; by default DIR.dsse.json beside it.",
            show_default=False,
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite the signature if it exists.")] = False,
) -> SignResult:
    """Check the files of an artifact or a merged folder, and sign them with a key."""
    from graftc.runtime.artifact.signatures import sign as sign_folder
    from graftc.runtime.artifact.signatures import signature_path

    run.out, run.force = signature_path(directory, out), force
    run.require_destination(directory, key)
    signed = sign_folder(directory, key, run.out, passphrase=lambda: _passphrase(key), force=force)
    return SignResult(
        artifact=str(directory),
        signature=str(signed.path if out is None else out),
        signer=signed.signer,
        file=signed.file,
        sha256=signed.sha256,
    )


def _passphrase(key: Path) -> str:
    """Return the passphrase of a key.

    Raises:
        GraftError: GC094 if there is none in the environment and nobody to ask.
    """
    import os
    import sys
    from getpass import getpass

    from graftc.specs.errors.diagnostics import GraftError

    passphrase = os.environ.get("GRAFTC_PASSPHRASE")
    if passphrase is not None:
        return passphrase
    if not sys.stdin.isatty():
        raise GraftError("GC094", f"{key} is encrypted", hint="set GRAFTC_PASSPHRASE, or run this in a terminal")
    return getpass(f"passphrase of {key}: ")


@sign.shows
def _show(result: SignResult, to: Console) -> None:
    to.print(f"{result.artifact}: signed by {result.signer}", soft_wrap=True, markup=False)
    to.print(f"wrote {result.signature}", soft_wrap=True, markup=False)
