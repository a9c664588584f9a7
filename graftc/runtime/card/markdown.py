"""Write Markdown that shows any text literally, since names of modules and adaptations may contain any characters."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from graftc.specs.errors.text import abridged, printable

_PLAIN = re.compile(r"[\w .,:;+*@=%#(){}\[\]/\"'-]*[\w.,:;+*@=%#(){}\[\]/\"'-]", re.ASCII)
_TICKS = re.compile("`{3,}")


def code(text: str, most: int = 100) -> str:
    """Return a text as inline code that also works in tables: no Markdown, HTML or link in it takes effect.

    Args:
        text: any text; line breaks become spaces, and control characters are escaped.
        most: the maximum number of characters to show; only the beginning and the end of a longer text are shown.
    """
    line = abridged(" ".join(printable(text).split()), most)
    if _PLAIN.fullmatch(line):
        return f"`{line}`"
    # Entities also work in tables, where renderers disagree about what ends a cell within backticks. Dots are escaped
    # as well, since GitHub turns text that begins with www. into links.
    return f"<code>{''.join(c if c.isalnum() or c in ' -' else f'&#{ord(c)};' for c in line)}</code>"


def fenced(text: str, language: str = "") -> str:
    """Return a code block whose fence is longer than every run of backticks in the text."""
    fence = "`" * max([3, *(len(run) + 1 for run in _TICKS.findall(text))])
    return f"{fence}{language}\n{printable(text).rstrip()}\n{fence}"


def table(columns: Sequence[str], rows: Iterable[Sequence[str]], right: Sequence[str] = ()) -> str:
    """Return a Markdown table.

    Args:
        columns: the names of the columns.
        rows: the rows, with one cell for each column; cells are already Markdown.
        right: the columns with numbers, which are aligned to the right.
    """
    rules = ["---:" if column in right else "---" for column in columns]
    return "\n".join("| " + " | ".join(row) + " |" for row in (columns, rules, *rows))
