"""The time of a test run: the processor seconds of every test, including the processes that it starts.

Processor time is nearly the same on a busy machine and on an idle one. Continuous integration prints it by folder, with
the unmarked tests that took long, so that they can be marked. It does not decide which tests run; marks do.
"""

from __future__ import annotations

import os
import time
from collections import defaultdict
from collections.abc import Iterator

import pytest

from tests.kit import warm

LONG = 1.0
"""Processor seconds from which continuous integration names a test that has no mark of its own."""

WARN = 15 * 60
"""Seconds of a whole run, without set-up, after which continuous integration warns."""

_PROPERTY, _UNMARKED = "processor seconds", "without a mark"


def name_of(nodeid: str) -> str:
    """Return a test's name without its parameters."""
    return nodeid.partition("[")[0]


def _used() -> float:
    now = os.times()
    return now.user + now.system + now.children_user + now.children_system + warm.spent


class Timing:
    """A pytest plugin that measures tests and prints a summary at the end.

    Args:
        before: the steps that ran before the tests, as text; None if no table was requested.
    """

    def __init__(self, before: str | None) -> None:
        self.before = before
        self.seconds: dict[str, float] = {}
        self.unmarked: set[str] = set()
        self.started = time.time()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        """Measure a test and its fixtures; worker processes send the time with their reports."""
        self._from = _used()
        return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[pytest.TestReport]:
        """Add the time used so far to the report of the last phase."""
        report: pytest.TestReport = yield
        if report.when == "teardown":
            report.user_properties.append((_PROPERTY, round(_used() - self._from, 3)))
            report.user_properties.append((_UNMARKED, item.get_closest_marker("slow") is None))
        return report

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Read the time from a report, in the process that prints the summary."""
        for name, value in report.user_properties:
            if name == _PROPERTY and isinstance(value, float):
                self.seconds[report.nodeid] = value
            if name == _UNMARKED and value is True:
                self.unmarked.add(report.nodeid)

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Print times by folder, long unmarked tests, the earlier steps, and a warning if the run took too long."""
        if self.before is None:
            return
        folders: dict[str, list[float]] = defaultdict(list)
        for nodeid, seconds in self.seconds.items():
            path = nodeid.partition("::")[0].split("/")
            folders["/".join(path[:2])].append(seconds)
        terminalreporter.section("processor seconds by folder")
        for folder, times in sorted(folders.items(), key=lambda entry: -sum(entry[1])):
            terminalreporter.line(f"{sum(times):8.1f} s  {len(times):5d} tests  {folder}")
        for nodeid in sorted(self.unmarked, key=self.seconds.__getitem__, reverse=True):
            if self.seconds[nodeid] >= LONG:
                terminalreporter.line(f"{self.seconds[nodeid]:8.1f} s  no mark says slow, sample or full: {nodeid}")
        own = time.time() - self.started
        terminalreporter.line(f"{sum(self.seconds.values()):8.1f} s  {len(self.seconds):5d} tests  in all")
        terminalreporter.line(f"time: {self.before}tests {own:.0f} s")
        whole = own + sum(int(word) for word in self.before.split() if word.isdigit())
        if whole > WARN:
            terminalreporter.line(f"warning: {whole / 60:.0f} minutes; more than {WARN // 60} is too long", yellow=True)
