"""docs/cli.md: every command of the Typer application, with its arguments and options."""

from __future__ import annotations

import re
from enum import Enum
from typing import Any

import typer.main

from graftc.cli.app import build_app
from graftc.cli.options import ExportFormat
from graftc.cli.schemas import schema_names
from graftc.runtime.export.formats import BUILT_IN
from graftc.runtime.export.registry import exporter_of
from tools.docs.markdown import code, fence, header, table

__all__ = ["commands", "render_cli"]

_STATUS = (
    ("0", "done"),
    ("1", "negative result: over budget, an adaptation that does not fold, a failed verification, a difference"),
    ("2", "the command line or the spec is wrong"),
    ("3", "a file or the model failed: missing, damaged, not capturable"),
    ("130", "interrupted"),
)
_ERRORS = """\
Errors are printed to standard error: the [code](errors.md), the location in the spec, a hint, and the corrected line
if one can be guessed. With `--json`, standard output contains `{"error": {...}}` instead. No traceback is printed
unless `GRAFTC_DEBUG=1` is set in the environment. Warnings go to standard error, or with `--json` into `"warnings"`.
"""


def commands() -> dict[str, Any]:
    """Return the click commands by name, in the order of the help; one in a group is named ``group command``."""
    group: Any = typer.main.get_command(build_app())
    return dict(_walk(group, ""))


def _walk(group: Any, before: str) -> list[tuple[str, Any]]:
    pairs: list[tuple[str, Any]] = []
    for name, command in group.commands.items():
        if command.hidden:
            continue
        inner = hasattr(command, "commands")
        pairs += _walk(command, f"{before}{name} ") if inner else [(f"{before}{name}", command)]
    return pairs


def render_cli() -> str:
    """Return the text of the page."""
    group: Any = typer.main.get_command(build_app())
    all_commands = commands()
    overview = [
        (f"[{code('graftc ' + name)}](#graftc-{_anchor(name)})", _first(command.help))
        for name, command in all_commands.items()
    ]
    parts = [
        header("Command line"),
        f"{_sentence(group.help)}\n",
        table(("command", "does"), overview),
        _parameters(group),
        "## MODEL\n",
        _epilog(group.epilog),
        "## Exit status\n",
        table(("status", "meaning"), _STATUS),
        _ERRORS,
        f"The `--json` output of every command conforms to a published JSON Schema: {_schemas()}.\n",
        *(_command(name, command) for name, command in all_commands.items()),
    ]
    return "\n".join(parts)


def _schemas() -> str:
    return ", ".join(f"[{name}](schemas/{name}.json)" for name in schema_names())


def _command(name: str, command: Any) -> str:
    parts = [
        f"## graftc {name}\n",
        f"{_markup(command.help or '')}\n",
        fence(_usage(name, command)),
        _parameters(command),
    ]
    if command.epilog:
        parts.append(f"{_markup(command.epilog)}\n")
    if name == "export":
        parts.append(_formats())
    return "\n".join(parts)


def _formats() -> str:
    """Return the table of built-in formats; a page must not depend on what is installed."""
    rows = []
    for exporter in map(exporter_of, BUILT_IN):
        typed = [option for option in exporter.options if option.flag or option.words or option.read is not None]
        words = [code(option.flag or f"--option {option.name}=") for option in typed]
        rows.append((code(exporter.name), exporter.summary, ", ".join(words)))
    return table(("format", "writes", "options of its own"), rows)


def _usage(name: str, command: Any) -> str:
    pieces = [_argument(p) for p in command.params if _is_argument(p) and not p.hidden]
    required = [f"{_longest(p)} {_metavar(p)}" for p in command.params if not _is_argument(p) and p.required]
    return " ".join([f"graftc {name}", *pieces, *required, "[OPTIONS]"])


def _parameters(command: Any) -> str:
    rows: list[tuple[str, str, str]] = []
    for parameter in command.params:
        if parameter.hidden:
            continue
        if _is_argument(parameter):
            name, default = code(_metavar(parameter)), "required" if parameter.required else _default(parameter)
        else:
            names = [*parameter.opts, *parameter.secondary_opts]
            value = "" if parameter.is_flag else f" {_metavar(parameter)}"
            name = ", ".join(
                code(f"{option}{value}") for option in sorted(names, key=lambda o: (o.startswith("--"), o))
            )
            default = "required" if parameter.required else _default(parameter)
        rows.append((name, default, " ".join(filter(None, (_markup(parameter.help or ""), _choices(parameter))))))
    rows.append(("`-h`, `--help`", "", "Show this command's help."))
    return table(("argument or option", "default", "meaning"), rows)


def _is_argument(parameter: Any) -> bool:
    return not hasattr(parameter, "is_flag")


def _argument(parameter: Any) -> str:
    name = _metavar(parameter)
    return name if parameter.required else f"[{name}]"


def _metavar(parameter: Any) -> str:
    name = str(parameter.metavar or parameter.name.upper()).strip("[]")
    return f"{name}..." if getattr(parameter, "multiple", False) or parameter.nargs == -1 else name


def _longest(parameter: Any) -> str:
    return max((str(option) for option in parameter.opts), key=len)


def _default(parameter: Any) -> str:
    value = parameter.default
    if value is None or value is False or value in ((), []):
        return ""
    if value is True:
        return "on"
    return code(str(getattr(value, "value", value)))


def _choices(parameter: Any) -> str:
    """Return the listed values of an option, if there are any; typer and click store them in different places."""
    kind = getattr(getattr(parameter, "type_descriptor", None), "annotation", None)
    if kind is ExportFormat:
        choices = list(BUILT_IN)
    elif isinstance(kind, type) and issubclass(kind, Enum):
        choices = [str(member.value) for member in kind]
    else:
        choices = [str(value) for value in getattr(getattr(parameter, "type", None), "choices", None) or ()]
    return f"One of {', '.join(map(code, choices))}." if choices else ""


def _first(text: str | None) -> str:
    return _markup((text or "").strip().partition("\n\n")[0])


def _sentence(text: str | None) -> str:
    return _markup((text or "").strip())


def _epilog(text: str | None) -> str:
    """Return the text of the help below the commands, without the exit statuses, which have their own table."""
    return f"{_markup((text or '').partition('Exit status')[0].strip())}\n"


def _markup(text: str) -> str:
    """Turn help text into Markdown, escaping what would be read as HTML."""
    text = re.sub(r"``([^`]+)``", r"`\1`", text)
    return text.replace("<", "&lt;").strip()


def _anchor(name: str) -> str:
    return re.sub(r"\s+", "-", name)
