"""The benchmark of bottleneck adapters runs, and its adapters equal the hand-written ones."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.adapters import ENTRIES, main


@pytest.mark.full
def test_every_entry_runs(tmp_path: Path) -> None:
    assert main(["--quick", "--out", str(tmp_path)]) == 0
    data = json.loads((tmp_path / "adapters.json").read_text())
    assert list(data["entries"]) == [entry.name for entry in ENTRIES] and not data["skipped"]
    entries = data["entries"]
    assert entries["bottleneck"]["trained_parameters"] == entries["by hand"]["trained_parameters"] == 2 * 32 * 2 + 34
    assert entries["AdaMix, one pass"]["trained_parameters"] == 4 * (32 * 2 + 2) + 2 * 32 + 32
    text = (tmp_path / "adapters.md").read_text()
    assert all(f"| {name} | " in text for name in entries)
