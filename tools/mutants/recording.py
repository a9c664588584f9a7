"""A pytest plugin that notes what each test takes and covers, and one that runs chosen tests until a time is up.

Both are configured by environment variables, since they run in a process of their own.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Generator
from pathlib import Path

import pytest

TIMES = "GRAFTC_MUTANTS_TIMES"
"""Variable with the file that gets a line for each test: its id, seconds, and whether it passed."""
CHOSEN = "GRAFTC_MUTANTS_CHOSEN"
"""Variable with a JSON file: a list of pairs of a test's id and the seconds it takes, in the order to run them."""
UNTIL = "GRAFTC_MUTANTS_UNTIL"
"""Variable with the time, as `time.time` has it, after which no test begins that would not end before it."""


def pytest_configure(config: pytest.Config) -> None:
    """Register what the environment asks for."""
    if TIMES in os.environ:
        config.pluginmanager.register(Recording(Path(os.environ[TIMES])), "graftc mutants recording")
    if CHOSEN in os.environ:
        chosen = json.loads(Path(os.environ[CHOSEN]).read_text(encoding="utf-8"))
        config.pluginmanager.register(Choosing(dict(chosen), float(os.environ[UNTIL])), "graftc mutants choosing")


class Recording:
    """Writes a line when a test starts and one when it is done; coverage.py, if it measures, gets to know the test."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.seconds = 0.0
        self.outcome = "passed"

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, object, object]:
        self.seconds, self.outcome = 0.0, "passed"
        self._write({"test": item.nodeid, "started": time.time()})
        _measure(item.nodeid)
        try:
            return (yield)
        finally:
            _measure("")
            self._write({"test": item.nodeid, "seconds": round(self.seconds, 3), "outcome": self.outcome})

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.seconds += report.duration
        if report.outcome != "passed" and self.outcome != "failed":
            self.outcome = report.outcome

    def _write(self, line: dict[str, object]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


class Choosing:
    """Keeps the chosen tests, in their order, and passes over those that would not end in time."""

    def __init__(self, chosen: dict[str, float], until: float) -> None:
        self.chosen = chosen
        self.until = until

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        places = {test: place for place, test in enumerate(self.chosen)}
        left_out = [item for item in items if item.nodeid not in places]
        items[:] = sorted((item for item in items if item.nodeid in places), key=lambda item: places[item.nodeid])
        config.hook.pytest_deselected(items=left_out)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> bool | None:
        return True if time.time() + self.chosen[item.nodeid] > self.until else None


def _measure(test: str) -> None:
    """Tell coverage.py, if it measures this process, which test the lines that follow belong to."""
    try:
        from coverage import Coverage
    except ImportError:
        return
    current = Coverage.current()
    if current is not None:
        current.switch_context(test)
