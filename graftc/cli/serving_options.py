"""The options of commands for serving engines."""

from __future__ import annotations

from typing import Annotated, TypeAlias

import typer

from graftc.runtime.serving.engines import ENGINES
from graftc.specs.errors.text import listed

EngineOption: TypeAlias = Annotated[
    str,
    typer.Option(
        "--engine", "-e", metavar="ENGINE", help=f"The engine: {listed(list(ENGINES), 'or')}.", show_default=False
    ),
]
ServedBaseOption: TypeAlias = Annotated[
    str | None,
    typer.Option(
        "--base",
        metavar="DIR",
        help="The base's folder. Default: the one that the artifact, or adapter_config.json, names.",
        show_default=False,
    ),
]
