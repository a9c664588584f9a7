"""JSON that somebody else may have written, read strictly. The standard library only."""

from __future__ import annotations

import json
import math
import re
from typing import Any, NoReturn

__all__ = ["read_json"]

_ESCAPED_HALF = re.compile(r"\\u[dD][89a-fA-F]")
_HALF = re.compile("[\ud800-\udfff]")
_WHOLE = 2**64


def read_json(raw: bytes, most: int, *, values: int | None = None) -> Any:
    """JSON data in which each key stands once, numbers are finite and of 64 bits, and texts are text.

    Args:
        raw: UTF-8.
        most: bytes that it may have.
        values: how many values it may have, counted before it is read: a value takes a hundred times the memory of its
            text. Commas and brackets in texts count too. Any number by default.

    Raises:
        ValueError: it is anything else, too large or too deep.
    """
    if len(raw) > most:
        raise ValueError(f"it has {len(raw)} bytes, more than {most}")
    if values is not None and sum(map(raw.count, (b",", b"[", b"{"))) > values:
        raise ValueError(f"it has more than {values:,} values")
    text = raw.decode("utf-8")
    try:
        data = json.loads(
            text, object_pairs_hook=_once, parse_constant=_constant, parse_int=_whole, parse_float=_finite
        )
    except RecursionError:
        raise ValueError("it is too deep") from None
    # UTF-8 has no halves, so that only an escape can make one; two of them may be a whole character.
    if _ESCAPED_HALF.search(text) and _has_half(data):
        raise ValueError("it holds half a character")
    return data


def _has_half(data: Any) -> bool:
    """Whether a text of the data, or a key, has a surrogate."""
    waiting = [data]
    while waiting:
        found = waiting.pop()
        if isinstance(found, dict):
            waiting += [*found, *found.values()]
        elif isinstance(found, list):
            waiting += found
        elif isinstance(found, str) and _HALF.search(found):
            return True
    return False


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key stands twice")
    return found


def _constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not a number")


def _whole(text: str) -> int:
    number = int(text) if len(text) <= 20 else _WHOLE
    if not -_WHOLE < number < _WHOLE:
        raise ValueError(f"a number of {len(text)} digits")
    return number


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text[:20]} is not a finite number")
    return number
