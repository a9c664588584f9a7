"""The benchmark of methods runs, and counts what it says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.methods import ALONE, METHODS, lines, main
from graftc.specs.registry import method_specs


def test_every_method_has_fewer_than_300_lines() -> None:
    """A method is two small modules, where those of peft's own packages have 366 lines and more."""
    tags = {tag for tag, _ in METHODS.values()} | set(ALONE.values())
    assert tags <= set(method_specs())
    assert {tag: lines(tag) for tag in tags if lines(tag) >= 300} == {}


@pytest.mark.full
def test_its_figures_are_complete(tmp_path: Path) -> None:
    """Every method that fits a tiny model has a row with the figures of both."""
    assert main(["--quick", "--only", "^(?!.*C3A)", "--out", str(tmp_path)]) == 0
    data = json.loads((tmp_path / "methods.json").read_text())
    assert not data["skipped"]
    for name in {*METHODS, *ALONE} - {"C3A"}:
        own = data["entries"][f"graftc {name}"]
        assert own["trained_parameters"] > 0 and own["over_floor"] > 0
        if name in METHODS:
            assert own["trained_parameters"] == data["entries"][f"peft {name}"]["trained_parameters"], name
    text = (tmp_path / "methods.md").read_text()
    assert all(f"| {name} |" in text for name in {*METHODS, *ALONE} - {"C3A"})
