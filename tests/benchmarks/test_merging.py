"""The benchmark of merging runs, and graftc's weights are peft's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.merging import CONTESTANTS, MODULES, TOLERANCE, main


@pytest.mark.full
def test_every_contestant_runs(tmp_path: Path) -> None:
    assert main(["--quick", "--out", str(tmp_path), "--work", str(tmp_path)]) == 0
    data = json.loads((tmp_path / "merging.json").read_text())
    assert 0 < data["difference"] < TOLERANCE
    for case in MODULES:
        assert [*data["turns"][case]] == [*CONTESTANTS]
        assert all(len(turns) == data["rounds"] == 2 for turns in data["turns"][case].values())
    text = (tmp_path / "merging.md").read_text()
    assert all(f"| {name} | " in text for name in CONTESTANTS)
