"""Help and listings load no torch; ``benchmarks/startup.py`` times them."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.kit.places import ROOT

_WITNESS = (
    "import sys; from graftc.cli import main; status = main(sys.argv[1:]); "
    "heavy = {'torch', 'transformers', 'numpy', 'networkx'} & set(sys.modules); "
    "print('loaded', sorted(heavy), file=sys.stderr); sys.exit(status)"
)


@pytest.mark.slow
@pytest.mark.sample("arguments0-0", "arguments2-0", "arguments5-0")
@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        (["--help"], 0),
        (["methods"], 0),
        (["methods", "lora"], 0),
        (["schema"], 0),
        (["check", "--help"], 0),
        (["inspect", "--help"], 0),
        (["export", "--help"], 0),
        (["check", "missing.yaml", "--model", "m"], 2),  # a wrong spec is reported without waiting for torch
    ],
)
def test_torch_stays_out(arguments: list[str], status: int) -> None:
    done = subprocess.run([sys.executable, "-c", _WITNESS, *arguments], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == status
    assert done.stderr.splitlines()[-1] == "loaded []"
