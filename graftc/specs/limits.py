"""Limits on the contents of a spec, which are checked on plain data before its values are read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from graftc.specs.errors.diagnostics import GraftError, Place
from graftc.specs.errors.text import quoted
from graftc.specs.source import DEPTH, FILE, VALUES, beyond, format_path

__all__ = [
    "ADAPTATIONS",
    "DEPTH",
    "FILE",
    "INTEGER",
    "LABELS",
    "NAME",
    "PATTERN_TOKENS",
    "SIZE",
    "TEXT",
    "TOKENS",
    "VALUES",
    "VERBALIZERS",
    "WORDS",
    "check_limits",
]

TEXT = 1_000
"""Maximum length of a string or a key, in characters."""

NAME = 100
"""Maximum length of the name of an adaptation or composition, in characters."""

INTEGER = 2**63 - 1
"""Maximum absolute value of an integer."""

SIZE = 65_536
"""Maximum rank, width or length of anything that a method adds."""

ADAPTATIONS = 1_000
"""Maximum number of adaptations in a spec, and of compositions."""

TOKENS = 10_000
"""Maximum number of tokens that a spec adds."""

LABELS = 1_000
"""Maximum number of labels that a model distinguishes by filling blanks."""

WORDS = 100
"""Maximum number of words for a label."""

VERBALIZERS = 1_000
"""Maximum number of verbalizers in a spec, and of patterns."""

PATTERN_TOKENS = 100
"""Maximum number of blanks in a pattern, and of tokens passed to a decoder."""


def check_limits(data: object) -> None:
    """Check plain data against the limits, without recursion and in time linear in its size.

    Args:
        data: mappings, lists and plain values; anything else in it is ignored.

    Raises:
        GraftError: GC009 if it is nested too deeply, or contains too many values, a text that is too long or an integer
            that is too large; GC010 if a text has a lone surrogate, which no file can contain.
    """
    waiting: list[tuple[object, tuple[str | int, ...]]] = [(data, ())]
    count = 0
    while waiting:
        value, path = waiting.pop()
        count += 1
        if count > VALUES:
            raise beyond(f"the spec contains more than {VALUES:,} values", Place(path=format_path(path)))
        if isinstance(value, str):
            _check_text(value, path)
        elif isinstance(value, int):
            if abs(value) > INTEGER:
                message = f"an integer of {value.bit_length():,} bits is too large"
                raise beyond(message, Place(path=format_path(path)), "integers have at most 63 bits and a sign")
        elif isinstance(value, Mapping | list | tuple):
            if len(path) >= DEPTH:
                raise beyond(f"the spec is nested deeper than {DEPTH} levels", Place(path=format_path(path)))
            waiting += _children(value, path)


def _children(
    value: Mapping[Any, Any] | list[Any] | tuple[Any, ...], path: tuple[str | int, ...]
) -> list[tuple[object, tuple[str | int, ...]]]:
    """Return the items of a container, last first, so that popping from the end yields the first one first."""
    if not isinstance(value, Mapping):
        return [(item, (*path, index)) for index, item in reversed(list(enumerate(value)))]
    for key in value:
        if isinstance(key, str):
            _check_text(key, path, "key")
        else:
            labels = path[-1:] == ("verbalizer",)
            hint = "labels are strings: put them in quotes" if labels else "keys are the names of fields"
            raise GraftError("GC002", f"a key must be a string, not {quoted(repr(key))}", place=_at(path), hint=hint)
    return [(item, (*path, key)) for key, item in reversed(list(value.items()))]


def _check_text(text: str, path: tuple[str | int, ...], what: str = "text") -> None:
    if len(text) > TEXT:
        message = f"a {what} of {len(text):,} characters is too long: {quoted(text, 40)}"
        raise beyond(message, _at(path), f"a {what} has at most {TEXT:,} characters")
    if not text.isascii() and any("\ud800" <= char <= "\udfff" for char in text):
        hint = "write the character itself, or both halves of its escape together"
        raise GraftError("GC010", f"{what} {quoted(text)} contains half of a character", place=_at(path), hint=hint)


def _at(path: tuple[str | int, ...]) -> Place:
    return Place(path=format_path(path))
