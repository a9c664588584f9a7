"""The names of files and tensors that an artifact may contain, checked before writing and when reading."""

from __future__ import annotations

import re
from collections.abc import Iterable

from graftc.specs.errors.diagnostics import GraftError
from graftc.specs.errors.text import abridged

FILE = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)*", re.ASCII)
TENSOR = re.compile(r"[^.]+(\.[^.]+)*")


def is_allowed(name: str, pattern: re.Pattern[str]) -> bool:
    """Return whether artifacts may contain a name; the pattern is `FILE` or `TENSOR`."""
    return len(name) <= 4096 and name.isprintable() and pattern.fullmatch(name) is not None


def require_allowed_names(tensors: Iterable[str]) -> None:
    """Refuse tensor names that artifacts cannot store.

    Raises:
        GraftError: GC064 for such a name.
    """
    for name in tensors:
        if not is_allowed(name, TENSOR):
            message = f"an artifact cannot contain a tensor named {abridged(repr(name), 80)}"
            hint = "rename the module: names must be printable, with at most 4,096 characters including the path"
            raise GraftError("GC064", message, hint=hint)
