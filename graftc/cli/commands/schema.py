"""``graftc schema``: the published JSON Schemas."""

from __future__ import annotations

from typing import Annotated

import typer

from graftc.cli import completion
from graftc.cli.options import Json

__all__ = ["schema"]


def schema(
    name: Annotated[
        str,
        typer.Argument(
            metavar="[NAME]",
            help="spec, manifest, pet-spec, error, or a command: what it prints with --json.",
            autocompletion=completion.schemas,
        ),
    ] = "spec",
    json: Json = True,
) -> None:
    """Print a JSON Schema, for editors and validators: of a spec, or of what a command prints."""
    from graftc.cli.output import print_json
    from graftc.cli.results.publish import published_schema

    print_json(published_schema(name))
