"""What a spec may hold at most. Plain data is held to it before anything looks at the values."""

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
"""Characters of a text or of a key."""

NAME = 100
"""Characters of the name of an adaptation or composition."""

INTEGER = 2**63 - 1
"""The largest integer, and without its sign the smallest."""

SIZE = 65_536
"""The largest rank, width or length of what a method adds."""

ADAPTATIONS = 1_000
"""Adaptations, and compositions, of a spec."""

TOKENS = 10_000
"""Tokens that a spec adds."""

LABELS = 1_000
"""Labels that a model tells apart by filling blanks."""

WORDS = 100
"""Words of a label."""

VERBALIZERS = 1_000
"""Verbalizers, and patterns, of a spec."""

PATTERN_TOKENS = 100
"""Blanks of a pattern, and tokens that a decoder is given."""


def check_limits(data: object) -> None:
    """Hold plain data to the limits, without recursion and in time linear in its size.

    Args:
        data: mappings, lists and plain values; whatever else is in it is passed over.

    Raises:
        GraftError: GC009 where it is nested too deeply, holds too many values, a text that is too long or an integer
            that is too large; GC010 where a text has a lone surrogate, which no file can hold.
    """
    waiting: list[tuple[object, tuple[str | int, ...]]] = [(data, ())]
    count = 0
    while waiting:
        value, path = waiting.pop()
        count += 1
        if count > VALUES:
            raise beyond(f"the spec holds more than {VALUES:,} values", Place(path=format_path(path)))
        if isinstance(value, str):
            _check_text(value, path)
        elif isinstance(value, int):
            if abs(value) > INTEGER:
                message = f"an integer of {value.bit_length():,} bits does not fit"
                raise beyond(message, Place(path=format_path(path)), "integers have at most 63 bits and a sign")
        elif isinstance(value, Mapping | list | tuple):
            if len(path) >= DEPTH:
                raise beyond(f"the spec is nested deeper than {DEPTH} levels", Place(path=format_path(path)))
            waiting += _children(value, path)


def _children(
    value: Mapping[Any, Any] | list[Any] | tuple[Any, ...], path: tuple[str | int, ...]
) -> list[tuple[object, tuple[str | int, ...]]]:
    """What a container holds, the last first: that is taken first from the end of a list."""
    if not isinstance(value, Mapping):
        return [(item, (*path, index)) for index, item in reversed(list(enumerate(value)))]
    for key in value:
        if isinstance(key, str):
            _check_text(key, path, "key")
        else:
            labels = path[-1:] == ("verbalizer",)
            hint = "labels are texts: write them in quotes" if labels else "keys are the names of fields"
            raise GraftError("GC002", f"a key is a text, not {quoted(repr(key))}", place=_at(path), hint=hint)
    return [(item, (*path, key)) for key, item in reversed(list(value.items()))]


def _check_text(text: str, path: tuple[str | int, ...], what: str = "text") -> None:
    if len(text) > TEXT:
        message = f"a {what} of {len(text):,} characters is too long: {quoted(text, 40)}"
        raise beyond(message, _at(path), f"a {what} has at most {TEXT:,} characters")
    if not text.isascii() and any("\ud800" <= char <= "\udfff" for char in text):
        hint = "write the character itself, or both halves of its escape together"
        raise GraftError("GC010", f"{what} {quoted(text)} holds half of a character", place=_at(path), hint=hint)


def _at(path: tuple[str | int, ...]) -> Place:
    return Place(path=format_path(path))
