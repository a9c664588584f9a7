"""Run commands in this process and in another, and compare with golden texts."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from graftc.cli import main
from graftc.cli.schemas import published_schema
from tests.kit import warm
from tests.kit.places import GOLDEN, ROOT


@dataclass(frozen=True)
class Outcome:
    """The result of a command."""

    status: int
    out: str
    err: str

    @property
    def data(self) -> Any:
        """The whole standard output, which must be JSON."""
        return json.loads(self.out)


def run_here(capsys: pytest.CaptureFixture[str], *arguments: str) -> Outcome:
    """Run a command in this process."""
    capsys.readouterr()
    status = main(arguments)
    captured = capsys.readouterr()
    return Outcome(status, captured.out, captured.err)


def run_valid(capsys: pytest.CaptureFixture[str], command: str, *arguments: str, status: int = 0) -> Any:
    """Return what a command prints with ``--json``, which must conform to its schema; standard error must be empty."""
    outcome = run_here(capsys, command, *arguments, "--json")
    assert (outcome.status, outcome.err) == (status, "")
    Draft202012Validator(published_schema("error" if "error" in outcome.data else command)).validate(outcome.data)
    return outcome.data


def run_apart(*arguments: str, cwd: Path | None = None, **environment: str) -> Outcome:
    """Run ``python -m graftc`` in another process."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **environment}
    command = [sys.executable, "-m", "graftc", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd or ROOT, env=env, timeout=120)
    return Outcome(done.returncode, done.stdout, done.stderr)


def run_warm(*arguments: str, cwd: Path, **environment: str) -> Outcome:
    """Run graftc in another process that has already imported torch; see `tests.kit.warm`."""
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        status = warm.run("graftc", *arguments, cwd=cwd, out=out, err=err, environment=environment)
        return Outcome(status, out.read_text(encoding="utf-8"), err.read_text(encoding="utf-8"))


def check_golden(name: str, text: str) -> None:
    """Compare with ``tests/golden/cli/NAME.txt``; times are blanked. GRAFTC_UPDATE_GOLDEN=1 writes it instead."""
    text = re.sub(r"(load|cached capture|capture|rewrite) \d+\.\d", r"\1 #.#", text).replace(
        "cached capture", "capture"
    )
    text = "\n".join(line.rstrip() for line in text.splitlines()).strip("\n") + "\n"
    path = GOLDEN / "cli" / f"{name}.txt"
    if os.environ.get("GRAFTC_UPDATE_GOLDEN") == "1":
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    assert path.is_file(), f"{path} is missing: run with GRAFTC_UPDATE_GOLDEN=1 and read what it writes"
    assert text == path.read_text(encoding="utf-8")
