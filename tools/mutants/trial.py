"""Run tests against mutants, and store the outcomes."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from tools.jsonl import append_line, read_lines
from tools.mutants.areas import file_of
from tools.mutants.choice import Mutant
from tools.mutants.recording import CHOSEN, TIMES, UNTIL
from tools.mutants.tree import Tree

SECONDS = 180.0
"""The time limit of a mutant, in seconds."""
FIRST = 4
"""Files of tests that run before the others are even collected, which takes longer than most tests."""
LONG = 20.0
"""Seconds below which no test counts as endless, however little it took when it was measured."""
MEMORY = 16 << 30
"""Bytes of addresses that a mutant may take; endless loops like to build lists."""


@dataclass(frozen=True)
class Outcome:
    """The outcome of running tests against a mutant.

    Attributes:
        key: the digest of the mutant and its file, `Mutant.trial`.
        outcome: ``caught``, ``timeout`` (a test that was still running after five times its time, which counts as
            caught), ``survived``, or ``invalid`` if no test could run.
        test: the test that caught it, empty if none did; a file if its collection failed.
        seconds: what it took.
        ran: how many tests ran.
    """

    key: str
    outcome: str
    test: str
    seconds: float
    ran: int

    @property
    def caught(self) -> bool:
        return self.outcome in ("caught", "timeout")


class Results:
    """Outcomes in a JSON Lines file; the last one of a mutant is valid."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> dict[str, Outcome]:
        """Return the outcomes by the mutants' digests; a line that a killed run has cut off is left out."""
        outcomes = {}
        for line in read_lines(self.path):
            outcomes[line["key"]] = Outcome(**{name: line[name] for name in Outcome.__dataclass_fields__})
        return outcomes

    def add(self, mutant: Mutant, outcome: Outcome) -> None:
        """Append an outcome, with the place and the lines of the mutant for people who read the file."""
        before, after = mutant.mutation.lines(mutant.text)
        place = {"number": mutant.number, "area": mutant.area, "path": mutant.path, "line": mutant.mutation.line}
        kind = mutant.mutation.kind
        append_line(self.path, {**asdict(outcome), **place, "kind": kind, "before": before, "after": after})


def tried(tree: Tree, mutant: Mutant, tests: Sequence[tuple[str, float]], limit: float = SECONDS) -> Outcome:
    """Run tests against a mutant until one fails or the time is up, and return what became of it.

    Args:
        tree: an up-to-date copy, which is as before when this returns.
        mutant: the mutant.
        tests: the ids of tests with the seconds each takes, in their order.
        limit: seconds.
    """
    files = list(dict.fromkeys(file_of(test) for test, _ in tests))
    first = [test for test in tests if file_of(test[0]) in files[:FIRST]]
    outcome, ran, begun = Outcome(mutant.trial, "survived", "", 0.0, 0), 0, time.time()
    with tree.changed(mutant.path, mutant.mutation.applied(mutant.text)):
        for part in (first, [test for test in tests if test not in first]):
            left = limit - (time.time() - begun)
            if part and left > 0 and outcome.outcome == "survived":
                outcome = _run(tree, mutant.trial, part, left)
                ran += outcome.ran
    return replace(outcome, seconds=round(time.time() - begun, 1), ran=ran)


def failing_without(tree: Tree, tests: Iterable[tuple[str, float]], limit: float = 3600.0) -> str:
    """Run tests against the sources as they are, and return the first one that fails, empty if none does.

    A test that fails without a mutant has not caught one.
    """
    outcome = _run(tree, "", list(tests), limit)
    return "" if outcome.outcome == "survived" else outcome.test or "all of them"


def _run(tree: Tree, key: str, tests: Sequence[tuple[str, float]], limit: float) -> Outcome:
    begun = time.time()
    with tempfile.TemporaryDirectory() as folder:
        chosen, times = Path(folder, "chosen.json"), Path(folder, "times.jsonl")
        chosen.write_text(json.dumps(tests), encoding="utf-8")
        files = list(dict.fromkeys(file_of(test) for test, _ in tests))
        plugin = ["-p", "tools.mutants.recording", "-p", "no:cacheprovider"]
        process = subprocess.Popen(
            [sys.executable, "-m", "pytest", "-x", "-q", *plugin, *files],
            cwd=tree.folder,
            env=tree.environment({TIMES: str(times), CHOSEN: str(chosen), UNTIL: str(begun + limit)}),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            preexec_fn=_bounded,
        )
        try:
            output, _ = process.communicate(timeout=limit)
            ended = False
        except subprocess.TimeoutExpired:
            output, ended = "", True
        finally:
            _end(process)
        seconds = round(time.time() - begun, 1)
        lines = list(read_lines(times))
    done = [line for line in lines if "outcome" in line]
    if ended:
        return _of_time(key, tests, lines, begun + limit, seconds)
    failed = next((str(line["test"]) for line in done if line["outcome"] == "failed"), "")
    if failed:
        return Outcome(key, "caught", failed, seconds, len(done))
    if process.returncode == 0:
        return Outcome(key, "survived", "", seconds, len(done))
    running = str(lines[-1]["test"]) if lines and "outcome" not in lines[-1] else ""  # the process ended within a test
    failed = running or next((file for file in files if f"ERROR {file}" in output), "")
    if failed or "ImportError while loading conftest" in output:
        return Outcome(key, "caught", failed or "tests/conftest.py", seconds, len(done))
    return Outcome(key, "invalid", output[-500:], seconds, len(done))


def _of_time(
    key: str, tests: Sequence[tuple[str, float]], lines: Sequence[Mapping[str, object]], end: float, seconds: float
) -> Outcome:
    """Return the outcome of a run that was ended: a timeout if the running test has taken far too long."""
    ran = sum("outcome" in line for line in lines)
    if lines and "outcome" not in lines[-1]:
        test, started = str(lines[-1]["test"]), float(str(lines[-1]["started"]))
        if end - started > max(LONG, 5 * dict(tests).get(test, 0.0)):
            return Outcome(key, "timeout", test, seconds, ran)
    return Outcome(key, "survived", "", seconds, ran)


def _bounded() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))


def _end(process: subprocess.Popen[str]) -> None:
    """End the process with what it has started, and wait for it."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
