"""Help and listings are quick and load no torch."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.cli.support import ROOT, run_apart


@pytest.mark.parametrize(
    ("arguments", "limit"),
    [(["--help"], 0.3), (["methods"], 0.5), (["methods", "lora", "--json"], 0.6), (["schema"], 0.6)],
    ids=lambda value: " ".join(value) if isinstance(value, list) else str(value),
)
def test_it_is_quick(arguments: list[str], limit: float) -> None:
    # Processor time of the command, best of several: other processes of the machine are not its fault.
    best = min(_seconds(arguments) for _ in range(4))
    assert best < limit


def _seconds(arguments: list[str]) -> float:
    before = os.times()
    outcome = run_apart(*arguments)
    after = os.times()
    assert outcome.status == 0
    return (after.children_user - before.children_user) + (after.children_system - before.children_system)


_WITNESS = (
    "import sys; from graftc.runtime.cli import main; status = main(sys.argv[1:]); "
    "heavy = {'torch', 'transformers', 'numpy', 'networkx'} & set(sys.modules); "
    "print('loaded', sorted(heavy), file=sys.stderr); sys.exit(status)"
)


@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        (["--help"], 0),
        (["methods"], 0),
        (["methods", "lora"], 0),
        (["schema"], 0),
        (["check", "--help"], 0),
        (["inspect", "--help"], 0),
        (["check", "missing.yaml", "--model", "m"], 2),  # a wrong spec is told without waiting for torch
    ],
)
def test_torch_stays_out(arguments: list[str], status: int) -> None:
    done = subprocess.run([sys.executable, "-c", _WITNESS, *arguments], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == status
    assert done.stderr.splitlines()[-1] == "loaded []"
