"""Run the tests of the checkout in an environment, and read their outcomes."""

from __future__ import annotations

import ast
import shlex
import subprocess
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tools.makefile import variables_for_tests
from tools.matrix.making import ReadyEnvironment
from tools.sources import ROOT

MARKS = "not full and not gate and not gpu"
"""The tests of ``make tests``."""
STORED = "tests/runtime/artifact/test_stored.py"
"""The tests of artifacts that earlier commits wrote; all of them run, whatever their marks."""


@dataclass
class Outcomes:
    """The outcomes of tests, by test id.

    Attributes:
        passed: those that passed.
        failed: those that failed or could not run, each with the first line of its message.
        skipped: those that were skipped, each with the reason.
        expected: those that failed as they are expected to.
        seconds: how long the runs took.
    """

    passed: set[str] = field(default_factory=set)
    failed: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    expected: set[str] = field(default_factory=set)
    seconds: float = 0.0

    def add(self, other: Outcomes) -> None:
        """Add the outcomes of another run; a test that ran in both counts once."""
        self.passed |= other.passed
        self.failed |= other.failed
        self.skipped |= other.skipped
        self.expected |= other.expected
        self.seconds += other.seconds


def run_tests(ready: ReadyEnvironment, arguments: Sequence[str], jobs: int, xml: Path, root: Path = ROOT) -> Outcomes:
    """Run pytest in an environment, and return the outcomes.

    Modules of the tests, and graftc itself, are imported from the checkout, which pytest puts in front
    (``pythonpath`` in pyproject.toml). The environment has graftc's wheel for the processes that tests start elsewhere.

    Args:
        ready: the environment.
        arguments: those of pytest.
        jobs: the processes that run tests.
        xml: the file that gets the outcomes in JUnit's format.
        root: the checkout.
    """
    xml.unlink(missing_ok=True)
    several = ["-n", str(jobs), "--dist", "worksteal"] if jobs > 1 else []
    # The cache of pytest belongs to the checkout's own runs.
    fixed = ["-q", "-p", "no:cacheprovider", "--continue-on-collection-errors", f"--junitxml={xml}"]
    command = [str(ready.python), "-m", "pytest", *fixed, *several, *arguments]
    print("$", shlex.join(command), flush=True)
    start = time.monotonic()
    status = subprocess.run(command, cwd=root, env=ready.variables(variables_for_tests()), check=False).returncode
    outcomes = read_junit(xml, root) if xml.is_file() else Outcomes()
    if status > 1 or (status and not outcomes.failed):
        outcomes.failed["pytest"] = f"ended with status {status}: {shlex.join(arguments)}"
    outcomes.seconds = time.monotonic() - start
    return outcomes


def read_junit(xml: Path, root: Path = ROOT) -> Outcomes:
    """Read the outcomes of a run of pytest from its file in JUnit's format."""
    outcomes = Outcomes()
    for case in ElementTree.parse(xml).getroot().iter("testcase"):
        test = _test_id(case.attrib, root)
        failures = [*case.iter("failure"), *case.iter("error")]
        skipped = case.find("skipped")
        if failures:
            outcomes.failed[test] = (failures[0].get("message") or "no message").splitlines()[0]
        elif skipped is None:
            outcomes.passed.add(test)
        elif skipped.get("type") == "pytest.xfail":
            outcomes.expected.add(test)
        else:
            outcomes.skipped[test] = _reason(skipped)
    outcomes.passed -= outcomes.failed.keys()  # a test and its teardown are two cases
    return outcomes


def _test_id(case: Mapping[str, str], root: Path) -> str:
    """Return the id of a test as pytest has it, or the path of a file that was not collected."""
    # A test's file is that of its class, which may inherit the test from another file.
    parts = case.get("classname", "").split(".") if case.get("classname") else case["name"].split(".")
    inside = [case["name"]] if case.get("classname") else []
    for end in range(len(parts), 0, -1):
        path = "/".join(parts[:end]) + ".py"
        if (root / path).is_file():
            return "::".join([path, *parts[end:], *inside])
    return "::".join([".".join(parts), *inside])


def _reason(skipped: ElementTree.Element) -> str:
    """Return why a test, or a whole file, was skipped."""
    message = skipped.get("message") or ""
    if message == "collection skipped":
        try:
            *_, message = ast.literal_eval(skipped.text or "")
        except (SyntaxError, ValueError):
            message = skipped.text or ""
    return " ".join(message.removeprefix("Skipped: ").split())


def new_skips(outcomes: Outcomes, known: Mapping[str, str]) -> dict[str, str]:
    """Return the skipped tests that are not among those that are known to be skipped, with the reasons."""
    return {test: reason for test, reason in sorted(outcomes.skipped.items()) if test not in known}


def stale_skips(outcomes: Outcomes, known: Mapping[str, str]) -> Iterator[str]:
    """Yield the tests that are known to be skipped, and ran."""
    for test in sorted(known):
        if test in outcomes.passed or test in outcomes.failed:
            yield test
