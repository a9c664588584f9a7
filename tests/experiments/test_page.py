"""docs/results.md shows the stored cells, and the code that computed them is still there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from experiments.page import PAGE, figure, text
from experiments.plans import parts
from experiments.staleness import stale
from experiments.store import Record, Store, sealed
from experiments.times_page import section, times


def test_the_page_shows_the_stored_cells() -> None:
    assert PAGE.read_text(encoding="utf-8") == text(), "run `python -m experiments page`"


def test_the_page_names_the_versions_of_the_cells(monkeypatch: pytest.MonkeyPatch) -> None:
    """A new release changes no figure, so that the page says the same."""
    monkeypatch.setattr("experiments.drift_plan.installed", lambda names: dict.fromkeys(names, "99.0.0"))
    assert PAGE.read_text(encoding="utf-8") == text()


def test_no_figure_is_stale() -> None:
    """Every figure of the page is one that the code of today would compute."""
    records = [record for name in parts() for record in Store(name).records().values()]
    old = stale(records)
    again = "run `python -m experiments PART --only NAME --prune`, then `python -m experiments page`"
    assert records and not old, "\n".join([f"{len(old)} figures of docs/results.md are out of date; {again}:", *old])


def test_a_changed_code_is_stale() -> None:
    part = parts()["parity"]
    own = next(iter(Store("parity").records().values()))
    changed = Record(own.cell, type(own.sources)("other", own.sources.data, own.sources.versions), own.figures)
    assert stale([changed]) == [f"{own.cell}: its method's modules, or those of the experiment, have changed"]
    assert own.cell in part.plan(Store(part.name).known)


def test_figures_are_shown_as_such(tmp_path: Path) -> None:
    assert [figure(value) for value in (None, 0.0, 1.26e-7)] == ["-", "0", "1.3e-07"]
    assert figure(2e-3, missed=True) == "**2.0e-03**"
    assert "cells in float32" in text(tmp_path)
    assert figure(1.022e-6, missed=True, gate=1e-6) == "**1.02e-06**"
    assert figure(2.7e-6, missed=True, gate=1e-6) == "**2.7e-06**"


def test_no_zero_has_a_sign() -> None:
    assert not re.search(r"[-+]0\.0+ ", text()) and " 0.00 MB" not in text()


def test_the_time_of_a_part_is_that_of_its_cells(tmp_path: Path) -> None:
    assert not times("tasks", tmp_path) and "| all |" not in "\n".join(section(tmp_path))
    store, own = Store("tasks", tmp_path), next(iter(Store("tasks").records().values()))
    store.add(own, {"seconds": 5400.0})
    store.times.write_text(store.times.read_text() + sealed({"digest": "of a cell that is gone", "seconds": 1}))
    assert times("tasks", tmp_path) == [5400.0]
    assert "| tasks | 1 | 1.5 | 90.0 min |" in "\n".join(section(tmp_path))


def test_every_part_takes_less_than_three_hours() -> None:
    """Two cells at a time, on the machines that computed the stored ones."""
    assert all(0 < sum(seconds) / 2 < 3 * 3600 for name in parts() if (seconds := times(name)))
