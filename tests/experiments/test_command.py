"""The command line of the experiments."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from experiments.__main__ import main
from experiments.cells import ROOT
from experiments.page import PAGE
from experiments.staleness import gaps
from experiments.store import FOLDER, Store


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
        (["page", "--quick"], "page does not take --quick"),
        (["pictures", "--only", "LoRA"], "pictures does not take --only"),
        (["page", "--out", "nowhere/at/all"], "no cells are stored in nowhere/at/all"),
        (["pictures", "--out", "nowhere/at/all"], "no cells are stored in nowhere/at/all"),
        (["parity", "--out", __file__], "not a folder"),
        (["parity", "--out", ""], "not a folder: an empty path"),
    ],
)
def test_wrong_options_are_refused(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_a_damaged_cell_ends_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "parity.jsonl").write_text("{}\n", encoding="utf-8")
    page = PAGE.read_bytes()
    for command in ("page", "pictures", "parity"):
        assert main([command, "--out", str(tmp_path)]) == 1
        out, err = capsys.readouterr()
        assert (out, err) == (
            "",
            f"error: {tmp_path}/parity.jsonl:1: the line does not have the checksum of its content\n",
        )
    assert PAGE.read_bytes() == page


def test_what_is_missing_is_told(tmp_path: Path) -> None:
    """And so is what is out of date: a page with neither looks like a complete one."""
    shutil.copytree(FOLDER, tmp_path, dirs_exist_ok=True)
    assert list(gaps(tmp_path)) == []
    (tmp_path / "tasks.jsonl").unlink()
    for name in ("parity.jsonl", "directions.times.jsonl"):
        lines = (tmp_path / name).read_bytes().splitlines(keepends=True)
        (tmp_path / name).write_bytes(b"".join(lines[1:]))
    told = list(gaps(tmp_path))
    assert len(told) == 3
    assert re.match(r"parity: 1 cells are missing: parity/minilm/float32/\S+$", told[0])
    assert any(re.match(r"tasks: \d+ cells are missing: ", line) for line in told)
    assert any(line.startswith("directions: 1 cells have no times: ") for line in told)


@pytest.mark.slow
@pytest.mark.parametrize("jobs", [1, 2])
def test_an_interrupted_run_ends_at_once(jobs: int, tmp_path: Path) -> None:
    """Of two processes, the cells that wait and those under way were computed to the end, and not stored."""
    command = [sys.executable, "-m", "tests.experiments.fakes", str(tmp_path / "cells"), f"interrupted {jobs}"]
    running = subprocess.Popen(
        command, cwd=ROOT, stderr=subprocess.PIPE, text=True, env={**os.environ, "GRAFTC_TESTS_WAIT": str(tmp_path)}
    )
    while not any(path.name.isdigit() for path in tmp_path.iterdir()):
        assert running.poll() is None
        time.sleep(0.1)
    running.send_signal(signal.SIGINT)
    _, told = running.communicate(timeout=60)
    assert running.returncode == 130 and "Traceback" not in told and "interrupted" in told


@pytest.mark.slow
def test_plans_load_no_torch() -> None:
    """The command sets the number of threads before anything imports torch."""
    code = "import sys; from experiments.plans import parts; parts(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
