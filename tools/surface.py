"""Write down the public surface of graftc: the names that docs/stability.md promises, with their signatures.

    python -m tools.surface

writes tests/surface.txt, which a test compares with the code. Fields of specs are in docs/schemas/spec.json, commands
and their options in docs/cli.md, and the records that commands print in docs/schemas.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Any

from pydantic import BaseModel

import graftc

STORED = Path(__file__).parents[1] / "tests" / "surface.txt"
_OBJECT = re.compile(r"<(?:\w+ )?[\w.<>]+(?: object)? at 0x[0-9a-f]+>")


class _Source(str):
    """An annotation that is shown as it stands in the source."""

    def __repr__(self) -> str:
        return str(self)


def surface() -> str:
    """Return a line for each public name of each public module, and an indented one for each public member."""
    modules = {"graftc": graftc, **{f"graftc.{name}": getattr(graftc, name) for name in _modules()}}
    return "\n\n".join("\n".join((f"# {name}", *_names(module))) for name, module in modules.items()) + "\n"


def _modules() -> list[str]:
    return [name for name in graftc.__all__ if inspect.ismodule(getattr(graftc, name))]


def _names(module: Any) -> Iterator[str]:
    for name in sorted(module.__all__):
        value = getattr(module, name)
        if inspect.isclass(value):
            yield f"class {name}{_signature(value)}"
            yield from (f"    {line}" for line in _members(value))
        elif callable(value):
            yield f"{name}{_signature(value)}"
        else:
            yield f"{name}: {type(value).__name__}"


def _members(cls: type) -> Iterator[str]:
    """Yield the public members that the class or one of graftc's classes above it defines, by their names.

    What a class has from pydantic is pydantic's to promise.
    """
    members: dict[str, str] = {}
    foreign = dir(BaseModel) if issubclass(cls, BaseModel) else ()
    for base in reversed(cls.__mro__):
        if base.__module__.split(".")[0] != "graftc":
            continue
        for name, annotation in vars(base).get("__annotations__", {}).items():
            members[name] = f"{name}: {annotation}"
        for name, value in [*vars(base).items()]:
            described = _member(name, value)
            if described is not None:
                members[name] = described
    yield from (members[name] for name in sorted(members) if not name.startswith("_") and name not in foreign)


def _member(name: str, value: Any) -> str | None:
    """Return the description of a member of a class; None for a value, which its annotation describes."""
    value = getattr(value, "wrapped", value)  # pydantic wraps stated properties when the class's JSON is first read
    if isinstance(value, classmethod | staticmethod):
        return f"{type(value).__name__} {name}{_signature(value.__func__)}"
    if isinstance(value, property):
        return f"property {name}{_returned(value.fget)}"
    function = getattr(value, "__wrapped__", value)
    return f"{name}{_signature(function)}" if inspect.isfunction(function) else None


def _returned(function: Any) -> str:
    annotation = inspect.signature(function).return_annotation
    return "" if annotation is inspect.Signature.empty else f" -> {annotation}"


def _signature(value: Any) -> str:
    """Return a signature with its annotations as they are written; nothing for what has none."""
    if inspect.isclass(value) and issubclass(value, BaseModel | Enum):
        return ""  # written by pydantic from the fields, or by enum, in another way in other versions
    if inspect.isfunction(value) and not value.__module__.startswith("graftc"):
        return "(...)"  # another library's, which may change with it
    try:
        signature = inspect.signature(value)
    except (TypeError, ValueError):
        return ""
    named = [parameter for name, parameter in signature.parameters.items() if not name.startswith("_")]
    parameters = [parameter.replace(annotation=_shown(parameter.annotation)) for parameter in named]
    shown = signature.replace(parameters=parameters, return_annotation=_shown(signature.return_annotation))
    return _OBJECT.sub("...", str(shown))


def _shown(annotation: Any) -> Any:
    return _Source(annotation) if isinstance(annotation, str) else annotation


def main() -> None:
    """Write the file."""
    STORED.write_text(surface(), encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
