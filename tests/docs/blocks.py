"""Fenced blocks of Markdown pages, in order, with the comment that marks them."""

from __future__ import annotations

import re
from dataclasses import dataclass

from tests.kit.places import ROOT

DOCS = ROOT / "docs"
_FENCE = re.compile(
    r"(?:^<!-- (?P<mark>[\w: ]+) -->\n(?:<div[^>]*>\n\n)?)?"
    r"^(?P<ticks>`{3,})(?P<language>\w*)(?: title=\"(?P<title>[^\"]*)\")?\n(?P<text>.*?)^(?P=ticks)$",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class Block:
    """One fenced block: its page, line, language, title, text, and the comment before it (``<!-- run -->``)."""

    page: str
    line: int
    language: str
    title: str
    text: str
    mark: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks(page: str, language: str | None = None) -> list[Block]:
    """Return the blocks of a page, given by its path in the docs folder."""
    text = (DOCS / page).read_text(encoding="utf-8")
    every = [
        Block(
            page, text.count("\n", 0, m.start("ticks")) + 1, m["language"], m["title"] or "", m["text"], m["mark"] or ""
        )
        for m in _FENCE.finditer(text)
    ]
    return [block for block in every if language in (None, block.language)]


def pages() -> list[str]:
    """Return every page of the docs folder."""
    return sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md"))
