"""A map from lines to the tests that run them, measured by coverage.py and stored for each test file."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tools.jsonl import read_lines
from tools.mutants.areas import Area, file_of, files_of_tests
from tools.mutants.recording import TIMES
from tools.mutants.tree import Tree

MARKS = "not full and not gate and not gpu"
"""The tests that are measured unless others are asked for: those of ``make test``."""


@dataclass
class Coverage:
    """The lines that tests run.

    Attributes:
        lines: for each source, and each of its lines that some test runs, these tests. Lines that only an import runs
            are not among them.
        seconds: what each test that passes takes, in the order of the run.
    """

    lines: dict[str, dict[int, set[str]]] = field(default_factory=lambda: defaultdict(lambda: defaultdict(set)))
    seconds: dict[str, float] = field(default_factory=dict)


def digest(path: Path) -> str:
    """Return a digest of a file's bytes, empty if there is no such file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16] if path.is_file() else ""


class Map:
    """The map of a tree's lines and tests, one JSON file for each test file.

    An entry is out of date if the test file has changed, or a source of which it has lines. Other changes, such as of
    what tests import, count once ``build/mutants/map`` is removed.
    """

    def __init__(self, tree: Tree, work: Path) -> None:
        self.tree = tree
        self.folder = work / "map"

    def measure(self, area: Area, sources: Sequence[str], marks: str, tell: Callable[[str], None]) -> None:
        """Run the area's tests whose entries are missing or out of date, a folder or file of `Area.tests` at a time.

        Args:
            area: the area.
            sources: the files to measure, those of all areas, since areas share tests.
            marks: an expression for ``-m`` of pytest that selects tests.
            tell: is called with a line for each run.

        Raises:
            RuntimeError: pytest could not run, or collected nothing that works.
        """
        for place in area.tests:
            old = [path for path in files_of_tests(self.tree.folder, [place]) if self._entry(path, marks) is None]
            if old:
                tell(f"{area.name}: measuring {len(old)} test files of {place}")
                self._run(old, sources, marks)

    def read(self, marks: str) -> Coverage:
        """Return what the valid entries say together."""
        result = Coverage()
        for path in files_of_tests(self.tree.folder, ["tests"]):
            entry = self._entry(path, marks)
            if entry is None:
                continue
            result.seconds |= entry["seconds"]
            for source, lines in entry["lines"].items():
                for line, tests in lines.items():
                    result.lines[source][int(line)].update(tests)
        return result

    def _file(self, path: str, marks: str) -> Path:
        of_marks = hashlib.sha256(marks.encode()).hexdigest()[:8]
        return self.folder / f"{path.removesuffix('.py').replace('/', '.')}.{of_marks}.json"

    def _entry(self, path: str, marks: str) -> dict[str, Any] | None:
        file = self._file(path, marks)
        if not file.is_file():
            return None
        entry = json.loads(file.read_text(encoding="utf-8"))
        return entry if all(digest(self.tree.folder / name) == was for name, was in entry["of"].items()) else None

    def _run(self, paths: list[str], sources: Sequence[str], marks: str) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        times, data = self.folder / "times.jsonl", self.folder / "coverage.data"
        for file in (times, data):
            file.unlink(missing_ok=True)
        command = [sys.executable, "-m", "coverage", "run", f"--include={','.join(sources)}", f"--data-file={data}"]
        command += [
            "-m",
            "pytest",
            "-q",
            "-p",
            "tools.mutants.recording",
            "-p",
            "no:cacheprovider",
            "-m",
            marks,
            *paths,
        ]
        environment = self.tree.environment({TIMES: str(times)})
        done = subprocess.run(command, cwd=self.tree.folder, env=environment, capture_output=True, text=True)
        if done.returncode not in (0, 1, 5) or (done.returncode != 5 and not times.is_file()):
            raise RuntimeError(f"{' '.join(command)}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
        self.keep(paths, times, data, marks)

    def keep(self, paths: Iterable[str], times: Path, data: Path, marks: str) -> None:
        """Write an entry for each of these test files from what one run of them has left."""
        seconds, lines = _seconds(times), _lines(data, self.tree.folder)
        for path in paths:
            own = {test: took for test, took in seconds.items() if file_of(test) == path}
            of_path: dict[str, dict[str, list[str]]] = defaultdict(dict)
            for source, by_line in lines.items():
                for line, tests in by_line.items():
                    if here := sorted(own.keys() & tests):
                        of_path[source][str(line)] = here
            of = {name: digest(self.tree.folder / name) for name in (path, *of_path)}
            entry = {"of": of, "seconds": own, "lines": of_path}
            partial = self._file(path, marks).with_suffix(".partial")
            partial.write_text(json.dumps(entry), encoding="utf-8")
            os.replace(partial, self._file(path, marks))


def _seconds(times: Path) -> dict[str, float]:
    """Return the seconds of the tests that passed, in the order of the run."""
    return {line["test"]: line["seconds"] for line in read_lines(times) if line.get("outcome") == "passed"}


def _lines(data: Path, root: Path) -> dict[str, dict[int, list[str]]]:
    from coverage import CoverageData

    measured = CoverageData(basename=str(data))
    if data.is_file():
        measured.read()
    contexts: dict[str, dict[int, list[str]]] = {}
    for name in measured.measured_files():
        path = Path(name)
        path = path.relative_to(root.resolve()) if path.is_absolute() else path
        contexts[path.as_posix()] = measured.contexts_by_lineno(name)
    return contexts
