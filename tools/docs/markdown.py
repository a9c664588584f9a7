"""Helpers that write Markdown."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

__all__ = ["cell", "code", "fence", "header", "prose", "table"]

COMMAND = "make docs"


def header(title: str) -> str:
    """Return the first lines of a generated page: a comment with the command that makes it, and its title."""
    return f"<!-- Made by `{COMMAND}` (python -m tools.docs) from the code; do not edit. -->\n\n# {title}\n"


def code(text: str) -> str:
    """Return inline code."""
    return f"`{text}`"


def cell(text: str) -> str:
    """Return text on one line that cannot end a table's cell."""
    return re.sub(r"\s+", " ", text).strip().replace("|", "\\|")


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table; cells are Markdown, and `cell` is applied to them."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(cell(text) for text in line)} |" for line in lines) + "\n"


def fence(text: str, language: str = "") -> str:
    """Return a block of code, fenced by as many backticks as it needs."""
    ticks = max((len(run) for run in re.findall(r"`{3,}", text)), default=2) + 1
    return f"{'`' * ticks}{language}\n{text.rstrip()}\n{'`' * ticks}\n"


def prose(text: str) -> str:
    """Turn a docstring into Markdown.

    Double backticks become single ones, Sphinx references their names, and arXiv numbers links. Paragraphs keep their
    lines.
    """
    text = re.sub(r":\w+:`~?([^`]+)`", r"`\1`", text)
    text = re.sub(r"``([^`]+)``", r"`\1`", text)
    return re.sub(r"\barXiv:(\d{4}\.\d{4,5})\b", r"[arXiv:\1](https://arxiv.org/abs/\1)", text).strip()
