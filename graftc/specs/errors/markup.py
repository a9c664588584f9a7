"""HTML for notebooks: escaped text, tables and collapsible sections. No scripts; colours are left to the notebook.

Uses only the standard library, so that every layer can use it.
"""

from __future__ import annotations

import html
from collections.abc import Collection, Iterable, Sequence

from graftc.specs.errors.text import one_line

LONGEST = 120
"""The maximum length of a name in characters; the middle of a longer one is omitted."""

LINE = 1_000
"""The maximum length of a line of text in characters."""

ROWS = 200
"""The number of rows that a table shows initially; the others are collapsed."""

_LEFT, _RIGHT = "text-align: left; vertical-align: top", "text-align: right; vertical-align: top"


class Html(str):
    """Text that is already HTML; any other text is escaped when it is inserted into HTML."""

    __slots__ = ()

    def _repr_html_(self) -> str:
        return str(self)


def escaped(value: object, most: int = LONGEST) -> Html:
    """Return any value as HTML text on one line, of limited length and without control characters.

    Non-ASCII text is isolated so that its writing direction does not affect its surroundings.
    """
    if isinstance(value, Html):
        return value
    text = one_line(str(value), most)
    safe = html.escape(text)
    return Html(safe if text.isascii() else f"<bdi>{safe}</bdi>")


def joined(parts: Iterable[object], between: str = "") -> Html:
    """Return the parts concatenated, each escaped."""
    return Html(html.escape(between).join(escaped(part) for part in parts))


def lines(text: str) -> Html:
    """Return a multi-line text as HTML."""
    return Html("<br>".join(escaped(line, LINE) for line in text.split("\n")))


def tag(name: str, content: object, most: int = LONGEST) -> Html:
    """Return an element without attributes around the escaped content."""
    return Html(f"<{name}>{escaped(content, most)}</{name}>")


def table(headings: Sequence[str], rows: Sequence[Sequence[object]], numbers: Collection[str] = ()) -> Html:
    """Return a table, or an empty string if there are no rows. Rows beyond the first 200 are collapsed.

    Args:
        headings: the column headings.
        rows: rows of cells, which are escaped.
        numbers: headings of the numeric columns.
    """
    if not rows:
        return Html()
    shown, rest = rows[:ROWS], rows[ROWS:]
    styles = [_RIGHT if heading in numbers else _LEFT for heading in headings]
    head = "".join(f'<th style="{s}">{escaped(h)}</th>' for h, s in zip(headings, styles, strict=True))
    lines = ("".join(f'<td style="{s}">{escaped(c)}</td>' for c, s in zip(row, styles, strict=True)) for row in shown)
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    result = Html(f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>")
    if rest:
        more = table(headings, rest, numbers) if len(rest) <= 10 * ROWS else Html()
        result = Html(result + folded(f"and {len(rest):,} more", more))
    return result


def folded(summary: object, content: object, *, shown: bool = False) -> Html:
    """Return content under a line that expands and collapses it, or only the line if there is no content.

    Args:
        summary, content: the line and the content, which are escaped.
        shown: whether the content is initially expanded.
    """
    if not content:
        return tag("div", summary)
    return Html(
        f"<details{' open' if shown else ''}><summary>{escaped(summary)}</summary>"
        f'<div style="margin-left: 1.2em">{escaped(content)}</div></details>'
    )


def bullets(items: Iterable[object], most: int = LINE) -> Html:
    """Return a list, or an empty string if there are no items."""
    lines = "".join(f"<li>{escaped(item, most)}</li>" for item in items)
    return Html(f"<ul>{lines}</ul>") if lines else Html()
