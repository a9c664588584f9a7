"""Where the time of a run goes: processor seconds of every test, its own processes included.

Processor time says the same on a busy machine and on a quiet one, nearly. Of it come the table by folder that
continuous integration prints, and ``tests/durations.json``, by which `tests/conftest.py` knows which
tests are slow.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import warm

FILE = Path(__file__).with_name("durations.json")
SLOW = 0.15
"""Processor seconds from which a test is slow, and recorded."""

LONG = 0.25
"""Processor seconds from which ``make test`` runs a test that is no contract on one family only."""

WARN = 15 * 60
"""Seconds of a whole run, without set-up, after which continuous integration warns."""

_PROPERTY = "processor seconds"


def recorded() -> dict[str, float]:
    """What tests took when durations were last recorded, by name: the mean over the parameters of each. Those that took
    less than `SLOW` are not there."""
    found: dict[str, float] = json.loads(FILE.read_text(encoding="utf-8")) if FILE.is_file() else {}
    return found


def name_of(nodeid: str) -> str:
    """A test's name without its parameters."""
    return nodeid.partition("[")[0]


def _used() -> float:
    now = os.times()
    return now.user + now.system + now.children_user + now.children_system + warm.spent


class Timing:
    """Measures, and tells or records at the end.

    Args:
        record: write `FILE`: what ran takes the place of what was known of it.
        before: what ran before the tests, as text; none when nobody asked for the table.
    """

    def __init__(self, record: bool, before: str | None) -> None:
        self.record, self.before = record, before
        self.seconds: dict[str, float] = {}
        self.started = time.time()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        """Measure a test, its fixtures included; the processes that run tests send it with their reports."""
        self._from = _used()
        return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[pytest.TestReport]:
        """Put what was used so far into the report of the last phase."""
        report: pytest.TestReport = yield
        if report.when == "teardown":
            report.user_properties.append((_PROPERTY, round(_used() - self._from, 3)))
        return report

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Take it from the report, in the process that tells."""
        for name, value in report.user_properties:
            if name == _PROPERTY and isinstance(value, float):
                self.seconds[report.nodeid] = value

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """The table by folder, the steps before, and a warning when all of it took long."""
        if self.record:
            self._write()
        if self.before is None:
            return
        folders: dict[str, list[float]] = defaultdict(list)
        for nodeid, seconds in self.seconds.items():
            path = nodeid.partition("::")[0].split("/")
            folders["/".join(path[:2])].append(seconds)
        terminalreporter.section("processor seconds by folder")
        for folder, found in sorted(folders.items(), key=lambda entry: -sum(entry[1])):
            terminalreporter.line(f"{sum(found):8.1f} s  {len(found):5d} tests  {folder}")
        own = time.time() - self.started
        terminalreporter.line(f"{sum(self.seconds.values()):8.1f} s  {len(self.seconds):5d} tests  in all")
        terminalreporter.line(f"time: {self.before}tests {own:.0f} s")
        whole = own + sum(int(word) for word in self.before.split() if word.isdigit())
        if whole > WARN:
            terminalreporter.line(f"warning: {whole / 60:.0f} minutes; more than {WARN // 60} is too long", yellow=True)

    def _write(self) -> None:
        found: dict[str, list[float]] = defaultdict(list)
        for nodeid, seconds in self.seconds.items():
            found[name_of(nodeid)].append(seconds)
        means = {name: round(statistics.fmean(seconds), 2) for name, seconds in found.items()}
        kept = {name: seconds for name, seconds in recorded().items() if name not in found}
        slow = {name: mean for name, mean in means.items() if mean >= SLOW}
        text = json.dumps(dict(sorted({**kept, **slow}.items())), indent=0, ensure_ascii=False)
        FILE.write_text(text + "\n", encoding="utf-8")
