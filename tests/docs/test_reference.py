"""The reference pages contain every promised name once."""

from __future__ import annotations

import re

import graftc
from tools.docs.blocks import DOCS

REFERENCES = {
    path.name: re.findall(r"^::: ([\w.]+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    for path in (DOCS / "reference").glob("*.md")
}


def test_every_promised_name_has_one_place() -> None:
    named = sorted(name for names in REFERENCES.values() for name in names if name.count(".") == 1)
    assert named == sorted(f"graftc.{name}" for name in graftc.__all__ if name != "__version__")
