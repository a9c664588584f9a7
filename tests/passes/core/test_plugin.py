"""A method in an installed third-party package is found, listed and passes the contract, without changes to graftc."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kit import warm
from tests.kit.places import EXAMPLES
from tests.kit.plugins import pip_install

PLUGIN = EXAMPLES / "plugin"


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a process with the plugin installed beside this graftc."""
    return {**os.environ, "PYTHONPATH": pip_install(PLUGIN, tmp_path_factory)}


def run(environment: dict[str, str], cwd: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], env=environment, cwd=cwd, capture_output=True, text=True, check=False
    )


@pytest.mark.slow
def test_it_is_listed(environment: dict[str, str], tmp_path: Path) -> None:
    process = run(environment, tmp_path, "-m", "graftc", "methods", "--json")
    assert process.returncode == 0, process.stderr
    assert '"scale"' in json.dumps(json.loads(process.stdout))


@pytest.mark.slow
def test_listing_loads_no_torch(environment: dict[str, str], tmp_path: Path) -> None:
    code = "import sys, graftc.specs.registry as r; print('scale' in r.method_specs(), 'torch' in sys.modules)"
    process = run(environment, tmp_path, "-c", code)
    assert process.stdout.split() == ["True", "False"], process.stderr


@pytest.mark.full
@pytest.mark.parametrize(
    "chosen",
    [
        "bert and not roberta and not deberta and not inductor and not folded",
        pytest.param("bert or gpt2", marks=pytest.mark.full),
    ],
    ids=["some", "all"],
)
def test_it_passes_the_contract(chosen: str, environment: dict[str, str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = ["pytest", "-q", "-p", "no:cacheprovider", "-k", chosen, str(PLUGIN / "tests")]
    status = warm.run(*command, cwd=tmp_path, out=out, err=out, environment=environment)
    text = out.read_text(encoding="utf-8")
    assert status == 0 and " passed" in text, text[-3000:]
