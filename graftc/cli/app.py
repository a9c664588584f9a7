"""The Typer application: its commands, and the options that do not belong to a command."""

from __future__ import annotations

from typing import Annotated

import typer

from graftc.cli.output import without_colours
from graftc.cli.registry import commands

_EPILOG = (
    "MODEL is a local transformers folder, a hub id, or package.module:callable that returns an nn.Module, "
    "or (model, example_inputs). "
    "Exit status: 0 done, 1 the answer is no, 2 usage or spec error, 3 the files or the model failed."
)


def build_app() -> typer.Typer:
    """Build the application with every command."""
    app = typer.Typer(
        add_completion=True,
        rich_markup_mode=None if without_colours() else "rich",
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback(epilog=_EPILOG)(_graftc)
    for name, command in commands().items():
        app.command(name, context_settings=command.settings)(command)
    return app


def _version(wanted: bool) -> None:
    if wanted:
        from graftc.version import __version__

        typer.echo(f"graftc {__version__}")
        raise typer.Exit


def _graftc(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Compile declarative specs of parameter-efficient fine-tuning against PyTorch models."""
