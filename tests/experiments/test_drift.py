"""Cells in other environments: the right versions compute them, and nothing else does."""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

import pytest

from experiments import drift, environments
from experiments.cells import ROOT, Sources
from experiments.drift_page import section
from experiments.drift_plan import METHODS, OLDEST, cell_in, compared, trained
from experiments.drift_plan import drift as planned
from experiments.drift_plan import environments as ages
from experiments.store import Record, Store


def versions(value: str) -> dict[str, str]:
    """Stand in for a cell's figures."""
    return environments.installed(OLDEST) | {"value": value}


def test_the_oldest_versions_are_the_lower_bounds() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    requirements = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    for name, version in OLDEST.items():
        bounds = [match[1] for one in requirements if (match := re.match(rf"{name}>=([\d.]+)", one))]
        assert bounds and all(version == bound or version == f"{bound}.0" for bound in bounds), name


def test_installed_versions_need_no_environment(tmp_path: Path) -> None:
    own = environments.installed(OLDEST)
    assert environments.interpreter(own, tmp_path) == Path(sys.executable)
    assert not any(tmp_path.iterdir())


@pytest.mark.slow
def test_a_function_is_called_with_the_versions_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = environments.installed(OLDEST)
    function = "tests.experiments.test_drift:versions"
    assert environments.call(function, "x", own, tmp_path) == {**own, "value": "x"}  # type: ignore[arg-type]
    monkeypatch.setattr(environments, "interpreter", lambda versions, folder: Path(sys.executable))
    with pytest.raises(RuntimeError, match="this environment has"):
        environments.call(function, "x", {**own, "peft": "0.1.0"}, tmp_path)  # type: ignore[arg-type]


def test_both_environments_compute_the_same_cells() -> None:
    cells = planned().plan(lambda _: None)
    by_age = {age: [cell for cell in cells if f"/{age}/" in cell.name] for age in ages()}
    oldest, newest = ([cell.settings["cell"] for cell in own] for own in by_age.values())
    assert oldest == newest and len(oldest) == 2 * len(METHODS)
    assert {cell.settings["part"] for cell in cells} == {"parity", "encoder"}
    assert all(cell.settings["part"] in drift.MODULES for cell in cells)


def test_figures_that_differ_are_bold(tmp_path: Path) -> None:
    store = Store("drift", tmp_path)
    for age, own in ages().items():
        loss = 0.25 if age == "oldest" else 0.5
        for cell, figures in (
            (compared()[0], {"end": 1.5, "losses": 1e-7}),
            (trained()[0], {"test": 0.875, "loss": loss}),
        ):
            store.add(Record(cell_in(cell, age, own), Sources("", "", {}), figures), {})
    text = "\n".join(section(tmp_path))
    row = "| LoRA | 1.500000 | 1.500000 | 1.0e-07 | 1.0e-07 | 87.5% | 87.5% | 0.250000 | **0.500000** |"
    assert row in text and f"{len(METHODS) - 1} of {len(METHODS)} rows have not been computed yet." in text
