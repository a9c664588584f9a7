"""Digests of sources, by which results are recognised as out of date."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def digest_with(paths: Iterable[Path], length: int) -> str:
    """Return the first characters of a digest of graftc's sources and of other files, by path and content."""
    total = hashlib.sha256()
    for path in [*sorted((ROOT / "graftc").rglob("*.py")), *paths]:
        total.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes() + b"\0")
    return total.hexdigest()[:length]
