"""Results do not depend on the processor: tests that are sensitive to the last bits run as on another processor."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.kit.places import ROOT
from tools.processors import CAPABILITIES, SETTINGS, environment, main, own_capability, possible

SENSITIVE = (
    "tests/passes/methods/test_adamix_contract.py::TestExperts::test_sixteen_bits",
    "tests/runtime/deploy/test_routes.py::test_a_choice_that_rounding_exchanges_is_stated_and_does_not_refuse",
)
"""Tests in 16 bits, whose results are of the order of what rounding does."""


def test_settings_have_every_value() -> None:
    """The settings cover each capability of torch and of oneDNN, and one and two threads."""
    values = {name: {setting[name] for setting in SETTINGS} for name in SETTINGS[0]}
    assert values["ATEN_CPU_CAPABILITY"] == {name.lower() for name in CAPABILITIES}
    assert values["ONEDNN_MAX_CPU_ISA"] == {"SSE41", "AVX2", "AVX512_CORE", "DEFAULT"}
    assert values["threads"] == {"1", "2"}
    assert environment(SETTINGS[0])["OMP_NUM_THREADS"] == environment(SETTINGS[0])["MKL_NUM_THREADS"] == "2"


@pytest.mark.parametrize(("capability", "count"), [("DEFAULT", 1), ("AVX2", 2), ("AVX512", 4), ("SVE256", 1)])
def test_no_setting_that_the_machine_cannot_run(capability: str, count: int) -> None:
    assert len(possible(capability)) == count


@pytest.mark.full
def test_under_another_capability(tmp_path: Path) -> None:
    """The sensitive tests pass under the capability that differs most from this machine's own."""
    setting = possible(own_capability())[0]
    arguments = ["-q", "-p", "no:cacheprovider", "-m", "not full", *SENSITIVE]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *arguments],
        cwd=ROOT,
        env={**os.environ, **environment(setting), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and " passed" in done.stdout, f"{setting}\n{done.stdout}\n{done.stderr}"


def test_a_failure_is_told_with_its_setting(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr("tools.processors.own_capability", lambda: "AVX2")
    seen: list[str] = []

    def tested(setting: dict[str, str], arguments: list[str]) -> int:
        assert arguments == ["tests/passes/core"]
        seen.append(setting["ATEN_CPU_CAPABILITY"])
        return len(seen) - 1

    monkeypatch.setattr("tools.processors.tested", tested)
    assert main(["tests/passes/core"]) == 1 and seen == ["default", "avx2"]
    said = capsys.readouterr().out
    assert "failed: ATEN_CPU_CAPABILITY=avx2" in said and "default ONEDNN_MAX_CPU_ISA=SSE41 threads=2: passed" in said
