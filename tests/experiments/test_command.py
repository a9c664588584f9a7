"""The command line of the experiments."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from experiments.__main__ import main
from experiments.cells import ROOT
from experiments.store import Store


@pytest.mark.slow
def test_a_quick_cell_is_stored_and_shown(tmp_path: Path) -> None:
    """Figures and times are in two files; a second run computes nothing."""
    command = ["parity", "--quick", "--only", "tiny-bert/float32/IA3/", "--out", str(tmp_path)]
    assert main(command) == 0
    (record,) = Store("parity", tmp_path).records().values()
    assert record.cell.name == "IA3" and record.figures["parameters"] > 0
    before = [(tmp_path / name).read_bytes() for name in ("parity.jsonl", "parity.times.jsonl")]
    assert b"seconds" not in before[0] and b"seconds" in before[1]
    assert main(command) == 0
    assert [(tmp_path / name).read_bytes() for name in ("parity.jsonl", "parity.times.jsonl")] == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["parity", "--only", "("], "not a regular expression"),
        (["parity", "--only", "no such cell"], "no cell matches"),
        (["parity", "--jobs", "0"], "at least 1"),
        (["other"], "invalid choice"),
    ],
)
def test_wrong_options_are_refused(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.slow
def test_plans_load_no_torch() -> None:
    """The command sets the number of threads before anything imports torch."""
    code = "import sys; from experiments.plans import parts; parts(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
