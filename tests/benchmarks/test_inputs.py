"""The benchmark of virtual tokens and prefixes runs, and its losses are those of peft."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.inputs import ENTRIES, LENGTH, main


@pytest.mark.full
def test_every_entry_runs(tmp_path: Path) -> None:
    assert main(["--quick", "--out", str(tmp_path)]) == 0
    data = json.loads((tmp_path / "inputs.json").read_text())
    assert list(data["entries"]) == [entry.name for entry in ENTRIES] and not data["skipped"]
    entries = data["entries"]
    for method, count in (("prompt", 32 * LENGTH), ("prefix", 2 * 32 * LENGTH)):
        assert entries[f"graftc {method}"]["trained_parameters"] == count
        assert entries[f"peft {method}"]["trained_parameters"] == count
    names = [f"{library} prefix, network" for library in ("graftc", "peft")]
    assert len({entries[name]["trained_parameters"] for name in names}) == 1
    text = (tmp_path / "inputs.md").read_text()
    assert all(f"| {name} | " in text for name in entries)
