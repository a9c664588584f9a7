"""Parse model cards as GitHub does, and check that no text in them escapes its place."""

from __future__ import annotations

import re
from typing import Any

from markdown_it import MarkdownIt

# What a card consists of within paragraphs and cells; there are no links, and no HTML but the tags of `code`.
_INLINE = {"text", "code_inline", "html_inline", "softbreak", "strong_open", "strong_close", "text_special"}


def tokens_of(text: str) -> list[Any]:
    """Return a card without its metadata, parsed as GitHub's Markdown."""
    return MarkdownIt("commonmark").enable("table").parse(text.split("\n---\n", 1)[1])


def require_contained(text: str, plain: str) -> None:
    """Check that a card with hostile names reads as one with plain names: no name adds anything but its own letters."""
    own, known = tokens_of(text), tokens_of(plain)
    skeleton = [[(t.type, t.tag, t.level) for t in each if t.type.startswith(("heading", "fence", "list"))]
                for each in (own, known)]  # fmt: skip
    assert skeleton[0] == skeleton[1]
    for table in cells_of(own):
        assert len(set(table)) == 1, "every row has as many cells as the heading"
    inner = [child for token in own for child in token.children or ()]
    assert {child.type for child in inner} <= _INLINE
    assert {child.content for child in inner if child.type == "html_inline"} <= {"<code>", "</code>"}
    assert not any(token.type == "html_block" for token in own)
    assert not any(c in text for c in "\x1b\x00\u202e")
    bare = re.sub(r"`[^`\n]*`", "", re.sub(r"^(`{3,}).*?^\1$", "", text, flags=re.DOTALL | re.MULTILINE))
    assert "evil.example" not in bare and "www." not in bare, "GitHub makes links of these wherever they stand"


def cells_of(tokens: list[Any]) -> list[list[int]]:
    """Return the number of cells of the rows of each table."""
    counts: list[list[int]] = []
    for token in tokens:
        if token.type == "table_open":
            counts.append([])
        elif token.type == "tr_open":
            counts[-1].append(0)
        elif token.type in ("td_open", "th_open"):
            counts[-1][-1] += 1
    return counts


HOSTILE = (
    "<script>alert(1)</script>",
    "a|b`c``d",
    "[x](javascript:alert(1))",
    "![x](https://evil.example/x.png)",
    "https://evil.example www.evil.example",
    "\n\n# heading\n---\n- x\n| a |\n",
    "\u202ereversed\x1b[31m\x00",
    "``` \n</code></td>",
    "y" * 10_000,
    "*bold* _it_ ~~no~~ &lt;b&gt; \\",
    "' \" : - {a: b} %TAG",
)
"""Names that mean harm."""
