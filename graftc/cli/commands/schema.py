"""``graftc schema``: print the published JSON Schemas."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from graftc.cli import completion
from graftc.cli.command import CommandRun, command


@command()
def schema(
    run: CommandRun,
    name: Annotated[
        str,
        typer.Argument(
            metavar="[NAME]",
            help="spec, manifest, pet-spec, error, or a command, for its --json output.",
            autocompletion=completion.schemas,
        ),
    ] = "spec",
) -> dict[str, Any]:
    """Print a JSON Schema for editors and validators, for a spec or for a command's output."""
    from graftc.cli.schemas import published_schema

    return published_schema(name)
