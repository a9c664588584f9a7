"""Arguments and options that commands share: one word and one help text each."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, TypeAlias

import typer

__all__ = ["Json", "Meta", "ModelArgument", "ModelOption", "SpecArgument"]

_MODEL_HELP = (
    "A transformers folder, a hub id, or package.module:callable; the callable returns the model, or (model, "
    "example_inputs) where graftc cannot tell its inputs: tensors by name, or in the order of forward's parameters."
)

Json: TypeAlias = Annotated[
    bool, typer.Option("--json", help="Print JSON on the standard output, errors included, and nothing else there.")
]
Meta: TypeAlias = Annotated[
    bool, typer.Option("--meta", help="Build the model without weights; a folder needs only its config.json.")
]
ModelArgument: TypeAlias = Annotated[str, typer.Argument(metavar="MODEL", help=_MODEL_HELP, show_default=False)]
ModelOption: TypeAlias = Annotated[
    str, typer.Option("--model", "-m", metavar="MODEL", help=_MODEL_HELP, show_default=False)
]
SpecArgument: TypeAlias = Annotated[
    Path, typer.Argument(metavar="SPEC", help="A spec: a .yaml, .json or .toml file.", show_default=False)
]
