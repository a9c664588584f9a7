"""The benchmark of generation runs, and each entry computes what its peer does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.generate import PARTS, TOLERANCE, chosen, main
from benchmarks.generation import entries


@pytest.mark.full
def test_every_entry_runs(tmp_path: Path) -> None:
    assert main(["--quick", "--out", str(tmp_path)]) == 0
    data = json.loads((tmp_path / "generate.json").read_text())
    case = data["cases"]["llama"]
    assert {*case["entries"], *case["skipped"]} == {entry.name for entry in entries(inductor=False)}
    assert {"floor", "transformers", "graftc base", "graftc merged", "graftc LoRA"} <= case["entries"].keys()
    for name in ("graftc base", "graftc LoRA"):
        assert 0 <= case["entries"][name]["difference"] < TOLERANCE
    assert all(len(one[part]["seconds"]) == data["rounds"] for one in case["entries"].values() for part in PARTS)
    text = (tmp_path / "generate.md").read_text()
    assert all(f"| {name} | " in text for name in case["entries"])


def test_entries_come_with_their_peers_and_the_floor() -> None:
    names = [entry.name for entry in chosen(entries(inductor=True), "LoRA|compile")]
    compiled = [f"{name}, torch.compile" for name in ("transformers", "graftc merged", "graftc LoRA")]
    assert names == ["floor", "transformers", "graftc merged", "graftc LoRA", *compiled]
