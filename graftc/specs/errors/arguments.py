"""Check arguments of the Python interface: an argument of the wrong type is a coded error."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from graftc.specs.errors.diagnostics import GraftError


def kind_of(value: Any) -> str:
    """Return a value's type for messages: ``"of type int"``, or ``"None"``."""
    return f"of type {type(value).__name__}" if value is not None else "None"


def as_path(path: Any) -> Path:
    """Return the argument as a path.

    Raises:
        GraftError: GC073 if it is neither a string nor a path, is empty, or contains a NUL character.
    """
    if isinstance(path, str | os.PathLike) and isinstance(text := os.fspath(path), str) and text and "\0" not in text:
        return Path(text)
    shown = repr(path) if isinstance(path, str) else kind_of(path)
    raise GraftError(
        "GC073",
        f"the path must be a non-empty string or a path, but it is {shown}",
        hint="pass a string or a pathlib.Path",
    )


def absolute_path(path: str | os.PathLike[str]) -> Path:
    """Return an absolute path without ``..``.

    Each ``..`` leads to the parent of the preceding folder, as when a file is opened: if that folder is a link, to the
    parent of the link's target. Links that are not followed by ``..`` are kept.
    """
    parts = Path(path).absolute().parts
    if ".." not in parts or "\0" in os.fspath(path):  # no file can have such a path
        return Path(*parts)
    behind = len(parts) - parts[::-1].index("..")
    return Path(os.path.realpath(Path(*parts[:behind])), *parts[behind:])


def as_seed(seed: Any) -> int:
    """Return the argument as a seed.

    Raises:
        GraftError: GC073 if it is not a 64-bit integer.
    """
    if isinstance(seed, int) and not isinstance(seed, bool) and -(2**63) <= seed < 2**64:
        return seed
    shown = "larger than 64 bits" if isinstance(seed, int) and not isinstance(seed, bool) else kind_of(seed)
    raise GraftError("GC073", f"the seed must be a 64-bit integer, but it is {shown}", hint="pass an integer")


def require_count(value: Any, what: str, hint: str, least: int = 0) -> None:
    """Check that a value is an integer of at least ``least``.

    Raises:
        GraftError: GC073 if it is not.
    """
    whole = isinstance(value, int) and not isinstance(value, bool)
    if not whole or value < least:
        raise GraftError(
            "GC073",
            f"{what} must be an integer of at least {least}, but it is {repr(value) if whole else kind_of(value)}",
            hint=hint,
        )


def as_budget(budget: Any) -> float | None:
    """Return the argument as a certificate's budget: None, or a non-negative number.

    Raises:
        GraftError: GC073 for anything else.
    """
    if budget is None:
        return None
    number = isinstance(budget, int | float) and not isinstance(budget, bool)
    if number and math.isfinite(budget) and budget >= 0:
        return float(budget)
    shown = repr(budget) if number else kind_of(budget)
    raise GraftError(
        "GC073",
        f"the budget must be a non-negative number, but it is {shown}",
        hint="pass a number, or None for the spec's budget",
    )


def as_names(names: Any) -> tuple[str, ...]:
    """Return the argument, one name or several, as a tuple of adaptation names.

    Raises:
        GraftError: GC073 for anything else, and for an empty collection.
    """
    chosen = (names,) if isinstance(names, str) else tuple(names) if isinstance(names, list | tuple | set) else ()
    if not chosen or not all(isinstance(name, str) for name in chosen):
        shown = repr(names) if isinstance(names, int | float) else kind_of(names)
        raise GraftError(
            "GC073",
            f"the names must be a string or a list of strings, but they are {shown}",
            hint='pass a name, or a non-empty list of names: ["a", "b"]',
        )
    return chosen


def as_mapping(values: Any, what: str, kind: type) -> Mapping[str, Any]:
    """Return the argument after checking that it is a mapping from names to values of the type ``kind``.

    Raises:
        GraftError: GC073 for anything else.
    """
    hint = f"pass a mapping from names to {kind.__name__}s"
    if not isinstance(values, Mapping):
        raise GraftError("GC073", f"the {what} must be a mapping, but the argument is {kind_of(values)}", hint=hint)
    for name, value in values.items():
        if not isinstance(name, str) or not isinstance(value, kind):
            shown = f"{name!r} of the {what}" if isinstance(name, str) else f"a name in the {what}"
            wrong = value if isinstance(name, str) else name
            raise GraftError("GC073", f"{shown} is {kind_of(wrong)}", hint=hint)
    return values
