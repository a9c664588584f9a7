"""The benchmark of serving runs, and each entry computes what its peer does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.generate import PARTS, TOLERANCE
from benchmarks.serving import entries, main


@pytest.mark.full
def test_every_entry_runs(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    assert main(["--quick", "--out", str(tmp_path)]) == 0
    data = json.loads((tmp_path / "serving.json").read_text())
    case = data["cases"]["llama"]
    assert [*case["entries"]] == [entry.name for entry in entries()] and not case["skipped"]
    same = [entry.name for entry in entries() if entry.equals]
    assert len(same) == 4 and all(0 <= case["entries"][name]["difference"] < TOLERANCE for name in same)
    assert all(len(one[part]["seconds"]) == data["rounds"] for one in case["entries"].values() for part in PARTS)
    assert case["changes"]["write"] > 0
    text = (tmp_path / "serving.md").read_text()
    assert all(f"| {name} | " in text for name in case["entries"])
