"""Read JSON from untrusted sources strictly. Uses the standard library only."""

from __future__ import annotations

import json
import math
import re
from typing import Any, NoReturn

_ESCAPED_HALF = re.compile(r"\\u[dD][89a-fA-F]")
_WHOLE = 2**64


def read_json(raw: bytes, most: int, *, values: int | None = None) -> Any:
    """Parse JSON with unique keys, finite numbers of at most 64 bits, and strings without lone surrogates.

    Args:
        raw: the JSON in UTF-8.
        most: maximum size in bytes.
        values: maximum number of values, counted before parsing: a value takes a hundred times the memory of its text.
            Commas and brackets within strings count as well. Unlimited by default.

    Raises:
        ValueError: if it is anything else, too large or nested too deeply.
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
        # UTF-8 has no surrogates, so only an escape can produce one; two of them may form a character.
        if _ESCAPED_HALF.search(text):
            json.dumps(data, ensure_ascii=False).encode()
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except UnicodeEncodeError:
        raise ValueError("it contains half a character") from None
    return data


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data = dict(pairs)
    if len(data) != len(pairs):
        raise ValueError("a key is repeated")
    return data


def _constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not a number")


def _whole(text: str) -> int:
    number = int(text) if len(text) <= 20 else _WHOLE
    if not -_WHOLE < number < _WHOLE:
        raise ValueError(f"a number has {len(text)} digits")
    return number


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text[:20]} is not a finite number")
    return number
