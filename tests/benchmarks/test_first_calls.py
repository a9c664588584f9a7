"""The figures of first calls: how they are summed, compared and bounded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import first_calls

RUN = {"import": 9.0, "capture": 1.0, "first forward": 2.0, "first tokens": 7.0, "certificate": 5.0, "memory": 100.0}
PEFT = {"import": 8.0, "first forward": 1.0, "memory": 80.0}
RUNS = {
    "graftc, cold": [RUN],
    "graftc, warm": [{**RUN, "capture": 0.0}],
    "peft": [PEFT],
    "transformers": [{"first tokens": 2.0, "memory": 0.0}],
}


def test_a_step_is_without_imports_and_what_comes_after_it() -> None:
    assert first_calls.step_seconds(RUN) == 3.0


def test_gates_compare_medians() -> None:
    ratios = first_calls.gates(RUNS, [{"4": 2.0, "126": 3.0}])
    assert ratios.keys() == first_calls.GATES.keys()
    assert ratios["first step, cold, over peft"] == 3.0 and ratios["first step, warm, over peft"] == 2.0
    assert ratios["first tokens, warm, over transformers"] == 3.5
    assert ratios["peak memory, cold, over peft"] == 1.25
    assert ratios["compiling 126 layers over 4"] == 1.5


@pytest.mark.parametrize(("deep", "status"), [(2.0, 0), (9.0, 1)])
def test_a_missed_gate_is_a_status(
    deep: float, status: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs: dict[str, Any] = {**RUNS, "peft": [{**PEFT, "first forward": 2.0, "memory": 95.0}]}
    runs["transformers"] = [{"first tokens": 4.0, "memory": 0.0}]
    monkeypatch.setattr(first_calls, "contest", lambda case, rounds, certify: runs)
    monkeypatch.setattr(first_calls, "started", lambda *arguments, cache="off": {"4": 1.0, "126": deep})
    assert first_calls.main(["--gates", "--rounds", "1", "--out", str(tmp_path)]) == status
    assert ("missed: compiling 126 layers over 4" in capsys.readouterr().err) == bool(status)
    kept = json.loads((tmp_path / "first_calls_gates.json").read_text())
    assert kept["gates"]["compiling 126 layers over 4"] == deep
    assert "| compiling 126 layers over 4 |" in (tmp_path / "first_calls_gates.md").read_text()
