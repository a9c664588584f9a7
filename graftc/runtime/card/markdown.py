"""Text in Markdown that says what it says, whatever is in it: names of modules and of adaptations are anybody's."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from graftc.specs.errors.text import abridged, printable

__all__ = ["code", "fenced", "table"]

_PLAIN = re.compile(r"[\w .,:;+*@=%#(){}\[\]/\"'-]*[\w.,:;+*@=%#(){}\[\]/\"'-]", re.ASCII)
_TICKS = re.compile("`{3,}")


def code(text: str, most: int = 100) -> str:
    """A text as code within a line, also in a table: no Markdown, HTML or link in it is one.

    Args:
        text: anything; line breaks are spaces, and what steers a terminal is written out.
        most: how many characters of it are shown; of a longer one the beginning and the end.
    """
    line = abridged(" ".join(printable(text).split()), most)
    if _PLAIN.fullmatch(line):
        return f"`{line}`"
    # Entities hold in tables, where readers differ on what ends a cell within backticks. Dots are among them, since
    # GitHub makes links of what begins with www.
    return f"<code>{''.join(c if c.isalnum() or c in ' -' else f'&#{ord(c)};' for c in line)}</code>"


def fenced(text: str, language: str = "") -> str:
    """A block of code, whose fence is longer than every run of backticks in it."""
    fence = "`" * max([3, *(len(run) + 1 for run in _TICKS.findall(text))])
    return f"{fence}{language}\n{printable(text).rstrip()}\n{fence}"


def table(columns: Sequence[str], rows: Iterable[Sequence[str]], right: Sequence[str] = ()) -> str:
    """A table of Markdown; cells are Markdown already.

    Args:
        columns: names of the columns.
        rows: one cell for each.
        right: columns of numbers.
    """
    rules = ["---:" if column in right else "---" for column in columns]
    return "\n".join("| " + " | ".join(row) + " |" for row in (columns, rules, *rows))
