"""The memory benchmark runs, and its losses are those of peft."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.memory import entries, half_entries, main
from benchmarks.train.models import TINY


@pytest.mark.full
def test_every_entry_runs(tmp_path: Path) -> None:
    assert main(["--quick", "--out", str(tmp_path)]) == 0
    data = json.loads((tmp_path / "memory.json").read_text())[str(TINY.vocabulary)]
    wanted = [entry.name for entry in (*entries(TINY.vocabulary), *half_entries(TINY.vocabulary))]
    assert list(data["entries"]) == wanted and not data["skipped"]
    assert all(f"| {name} | " in (tmp_path / "memory.md").read_text() for name in wanted)
    figures = data["entries"]
    assert figures["graftc LoRA"]["saved_bytes"] < figures["peft LoRA"]["saved_bytes"]
    assert figures["graftc LoRA, budget 0.6"]["saved_bytes"] < figures["graftc LoRA"]["saved_bytes"]
