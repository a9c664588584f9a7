"""Format values for messages: short, on one line, without control characters. Uses only the standard library."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from os import PathLike
from typing import Any

_MOST = 100
"""The maximum length of a value in a message, in characters."""

# C0 and C1 controls except tab and newline, separators that break lines, bidirectional controls, lone surrogates.
_STEERS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
_BREAKS = str.maketrans({"\n": r"\n", "\t": r"\t"})


def reason_in(message: str) -> str:
    """Return the words of a validator from one of pydantic's messages, with the first letter in lower case."""
    reason = message.removeprefix("Value error, ").removeprefix("Assertion failed, ")
    return reason[:1].lower() + reason[1:]


def printable(text: str, form: str | None = None) -> str:
    r"""Return the text with terminal controls escaped, such as ``\x1b`` and ``\u202e``. Tabs and newlines stay.

    Args:
        text: any text.
        form: a format string for an escaped character's code point; by default as in Python.
    """
    return _STEERS.sub(lambda match: (form or _form(ord(match.group()))).format(ord(match.group())), text)


def _form(code: int) -> str:
    return "\\x{:02x}" if code < 0x100 else "\\u{:04x}"


def encodable(data: Any) -> Any:
    """Return plain data with lone surrogates, which occur in file names that are not UTF-8, escaped."""
    if isinstance(data, str):
        return data if data.isascii() else data.encode("utf-8", "backslashreplace").decode()
    if isinstance(data, Mapping):
        return {encodable(key): encodable(value) for key, value in data.items()}
    return [encodable(item) for item in data] if isinstance(data, list | tuple) else data


def shortened(text: str, most: int = _MOST) -> str:
    """Return the text, or its beginning and its length if it is too long."""
    return text if len(text) <= most else f"{text[: most - 3]}... ({len(text):,} characters)"


def abridged(text: str, most: int = _MOST) -> str:
    """Return the text, or, if it is too long, its beginning and end: both are needed to recognise a path."""
    left = (most - 3 + 1) // 2
    return text if len(text) <= most else f"{text[:left]}...{text[len(text) - (most - 3 - left) :]}"


def one_line(text: str, most: int = _MOST) -> str:
    """Return the text `abridged`, on one line and printable."""
    return printable(abridged(text, most)).translate(_BREAKS)


def counted(number: int, noun: str = "site") -> str:
    """Return a count with its noun, in the plural unless the count is one: ``1 site``, ``1,200 sites``."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def quoted(text: str | PathLike[str], most: int = _MOST) -> str:
    """Return a name or pattern as shown in messages: in single quotes, on one line, short and printable."""
    return f"'{printable(shortened(str(text), most)).translate(_BREAKS)}'"


class _Short(reprlib.Repr):
    """A `reprlib.Repr` with representations of bounded size."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel = 3
        self.maxlist = self.maxtuple = self.maxdict = self.maxset = self.maxfrozenset = 6
        self.maxstring = self.maxother = _MOST

    def repr_int(self, x: int, level: int) -> str:
        bits = x.bit_length()
        return repr(x) if bits <= 128 else f"an integer of {bits:,} bits"

    def repr_str(self, x: str, level: int) -> str:
        return repr(x[:_MOST] + "..." if len(x) > _MOST else x)


_SHORT = _Short()


def shown(value: object, most: int = _MOST) -> str:
    """Return any value as shown in messages: short and printable, with null, true and false as in YAML.

    Args:
        value: any value, however large; nested and long values are shown only in part.
        most: the maximum number of characters.
    """
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    text = printable(_SHORT.repr(value))
    return text if len(text) <= most else text[: most - 3] + "..."


def listed(words: Sequence[str], last: str = "and") -> str:
    """Return words as a list in a sentence, by default with "and": ``a``, ``a and b``, ``a, b and c``."""
    return f" {last} ".join(filter(None, (", ".join(words[:-1]), *words[-1:])))


def some(words: Sequence[str], most: int = 40) -> str:
    """Return the first words of a list, followed by the number of omitted ones."""
    rest = len(words) - most
    return ", ".join(words[:most]) + (f" and {rest:,} more" if rest > 0 else "")


def format_runs(runs: Sequence[tuple[int, int]], limit: int = 4) -> str:
    """Return runs as text, ``0:48,96:144``; if there are more than ``limit``, the first runs and the total number."""
    text = ",".join(f"{a}:{b}" for a, b in runs[:limit])
    return text if len(runs) <= limit else f"{text},... ({len(runs)} runs)"


def format_layers(layers: Iterable[int]) -> str:
    """Return layer numbers as text: ``0-11``, ``0,2,4``."""
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in consecutive(layers))


def consecutive(numbers: Iterable[int]) -> list[tuple[int, int]]:
    """Return the first and the last number of each run of consecutive numbers, in ascending order."""
    numbered = enumerate(sorted(set(numbers)))
    runs = [list(run) for _, run in groupby(numbered, key=lambda pair: pair[1] - pair[0])]
    return [(run[0][1], run[-1][1]) for run in runs]


def size_text(count: int) -> str:
    """Return a number of bytes with a unit: ``1.50 GB``."""
    for unit, name in ((1000**3, "GB"), (1000**2, "MB"), (1000, "kB")):
        if abs(count) >= unit:
            return f"{count / unit:.2f} {name}"
    return f"{count} B"
