"""The commands by name. To add a command, add a file to `graftc.cli.commands`, and its name here."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib import import_module
from typing import Any

_COMMANDS = (
    *("compile", "import_peft", "inspect", "merge", "convert", "export", "card", "sign", "verify", "diff"),
    *("serve_check", "serve_plan", "generate", "chat", "pet", "trl", "check", "roles", "methods", "schema", "demo"),
)
"""The files in `graftc.cli.commands`, each with a command of the same name, in the order in which help lists them."""


@cache
def commands() -> Mapping[str, Any]:
    """Return each `graftc.cli.command.Command` by its name on the command line."""
    modules = {name: import_module(f"graftc.cli.commands.{name}") for name in _COMMANDS}
    return {name.replace("_", "-"): getattr(module, name) for name, module in modules.items()}
