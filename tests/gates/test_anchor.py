"""The anchor's mutation test: a graph that differs from the model is never used."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.gates.anchored import entering


@pytest.mark.full
@pytest.mark.parametrize("kind", ["captured", "cached", "artifact"])
@pytest.mark.parametrize("count", [pytest.param(30, marks=pytest.mark.gate), 4])
def test_no_mutant_is_used(kind: str, count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every mutant whose outputs differ beyond the bound on any of 20 random inputs is caught before it is used."""
    results = list(entering(kind, count, tmp_path, monkeypatch))
    wrong = [text for text, differs, _ in results if differs]
    assert len(results) == count and len(wrong) >= count // 2
    assert [text for text, differs, caught in results if differs and not caught] == []
