"""Parse sizes in bytes from readable text."""

from __future__ import annotations

import re
from typing import Any

from graftc.specs.errors.diagnostics import GraftError

_UNITS = {unit: 1000**power for power, unit in enumerate(("", "k", "m", "g", "t"))}
_PATTERN = re.compile(r"\s*([0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*([kmgt]?)(i?)(b?)\s*", re.IGNORECASE)


def bytes_of(given: Any) -> int:
    """Return the number of bytes that a text such as ``24GB``, ``24 GiB`` or ``512MB``, or a number, represents.

    Raises:
        GraftError: GC154 for a value that is not a positive size.
    """
    count = 0
    if isinstance(given, str):
        match = _PATTERN.fullmatch(given)
        if match is not None and (match[2] or not match[3]):
            unit = match[2].lower()
            factor = 1024 ** list(_UNITS).index(unit) if match[3] else _UNITS[unit]
            count = int(float(match[1]) * factor)
    elif isinstance(given, int | float) and not isinstance(given, bool) and given < float("inf"):
        count = int(given)
    if count <= 0:
        digits = re.search(r"[0-9]+(\.[0-9]+)?", str(given))
        near = (
            f"did you mean '{digits[0]}GB'?" if digits and float(digits[0]) > 0 else "for example '24GB' or '22.5GiB'"
        )
        raise GraftError("GC154", f"{given!r} is not a number of bytes", hint=near)
    return count
