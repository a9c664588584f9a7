"""``python -m tools.matrix``: run the tests in environments of other versions; with ``--walk``, what pages show."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path

from tools.matrix.environments import ENVIRONMENTS, PLAIN, Environment, read_project
from tools.matrix.making import FOLDER, MatrixError, ReadyEnvironment, build_wheel, find_interpreter, make_environment
from tools.matrix.report import row_of_tests, row_of_walk, table_of_tests, table_of_walks, write_report
from tools.matrix.testing import MARKS, STORED, Outcomes, new_skips, run_tests, stale_skips
from tools.matrix.walking import environment_of, walk
from tools.matrix.walks import SCRIPTS
from tools.sources import ROOT

SKIPS = ROOT / "tests" / "skips.json"
"""The tests that are skipped in each environment, with the reasons."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line, and return the exit status: 1 if a test fails, is newly skipped, or a script is wrong."""
    parser = argparse.ArgumentParser(prog="python -m tools.matrix", description=__doc__)
    every = {each.name: each for each in (*ENVIRONMENTS, PLAIN)}
    parser.add_argument("--only", action="append", metavar="NAME", choices=every, help=f"of {', '.join(every)}")
    parser.add_argument(
        "--python", action="append", default=[], metavar="VERSION=PATH", help="an interpreter, as 3.13=/opt/bin/python3"
    )
    parser.add_argument("--fresh", action="store_true", help="make the environments again, with what pip finds today")
    parser.add_argument("--make", action="store_true", help="only make the environments")
    parser.add_argument("--jobs", type=int, default=2, help="processes that run tests (2)")
    parser.add_argument("--record", action="store_true", help=f"write which tests are skipped to {SKIPS.name}")
    parser.add_argument(
        "tests", nargs="*", metavar="-- ARGS", help="those of pytest, instead of what `make tests` runs"
    )
    parser.add_argument(
        "--walk", action="store_true", help="run the scripts of tools/matrix/walks.py, with the wheel only"
    )
    parser.add_argument("--script", action="append", choices=[script.name for script in SCRIPTS], help="of the walk")
    options = parser.parse_args(arguments)
    interpreters = dict(word.partition("=")[::2] for words in options.python for word in words.split())
    chosen = [
        every[name] for name in options.only or ([PLAIN.name] if options.walk else [e.name for e in ENVIRONMENTS])
    ]
    try:
        maker = Maker(interpreters, options.fresh)
        if options.walk:
            return _walk(chosen, maker, options.script)
        return _test(chosen, maker, options)
    except (MatrixError, subprocess.CalledProcessError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


class Maker:
    """Makes environments with the wheel of the checkout, each once in a run."""

    def __init__(self, interpreters: Mapping[str, str], fresh: bool) -> None:
        self.interpreters, self.fresh = interpreters, fresh
        self.project = read_project()
        self.ready: dict[str, ReadyEnvironment] = {}

    @cached_property
    def wheel(self) -> Path:
        """The wheel of the checkout, built when it is first needed."""
        return build_wheel()

    def __call__(self, environment: Environment) -> ReadyEnvironment:
        """Return an environment, made unless it is there."""
        if environment.name not in self.ready:
            interpreter = find_interpreter(environment.python, self.interpreters)
            self.ready[environment.name] = make_environment(
                environment, self.project, interpreter, self.wheel, fresh=self.fresh
            )
        return self.ready[environment.name]


def _test(chosen: Sequence[Environment], maker: Maker, options: argparse.Namespace) -> int:
    """Make the environments, run the tests in each, print what is wrong and a table, and return the exit status."""
    for environment in chosen:  # a missing interpreter is found before the tests run
        find_interpreter(environment.python, maker.interpreters)
    known = read_skips()
    rows, wrong = [], list[str]()
    for environment in chosen:
        ready = maker(environment)
        if options.make:
            outcomes = Outcomes()
        else:
            outcomes = _outcomes(ready, options.tests, options.jobs)
            if options.record:
                known = recorded(known, environment.name, outcomes, whole=not options.tests)
                write_skips(known)
            wrong += complaints(environment.name, outcomes, known.get(environment.name, {}))
        rows.append(row_of_tests(ready, outcomes))
    write_report(FOLDER / "report.json", rows)
    print(*wrong, "", table_of_tests(rows), sep="\n")
    return int(any(not line.startswith("note: ") for line in wrong))


def _outcomes(ready: ReadyEnvironment, arguments: Sequence[str], jobs: int) -> Outcomes:
    """Run the tests that are asked for, by default those of ``make tests`` and all of stored artifacts."""
    runs = {"": arguments} if arguments else {"": ["-m", MARKS], "-stored": [STORED]}
    total = Outcomes()
    for name, own in runs.items():
        total.add(run_tests(ready, own, jobs, FOLDER / f"{ready.environment.name}{name}.xml"))
    return total


def complaints(name: str, outcomes: Outcomes, known: Mapping[str, str]) -> list[str]:
    """Return a line for each failed test, and for each that is skipped and not known to be; others are notes."""
    return [
        *(f"failed in {name}: {test}: {message}" for test, message in sorted(outcomes.failed.items())),
        *(
            f"skipped in {name}, and not in {SKIPS.name}: {test}: {reason}"
            for test, reason in new_skips(outcomes, known).items()
        ),
        *(f"note: no longer skipped in {name}: {test}" for test in stale_skips(outcomes, known)),
    ]


Skips = Mapping[str, Mapping[str, str]]


def read_skips(path: Path = SKIPS) -> Skips:
    """Return the tests that are known to be skipped, with the reasons, by environment."""
    if not path.is_file():
        return {}
    stored: Skips = json.loads(path.read_text(encoding="utf-8"))
    return stored


def recorded(known: Skips, name: str, outcomes: Outcomes, whole: bool) -> Skips:
    """Return the known skips, updated by a run in an environment.

    Args:
        known: the skips known before.
        name: the environment.
        outcomes: the outcomes of the run.
        whole: whether every test ran; otherwise entries of tests that did not run stay.
    """
    ran = {*outcomes.passed, *outcomes.failed, *outcomes.skipped, *outcomes.expected}
    not_run = {} if whole else {test: why for test, why in known.get(name, {}).items() if test not in ran}
    return {**known, name: {**not_run, **outcomes.skipped}}


def write_skips(known: Skips, path: Path = SKIPS) -> None:
    """Write what is known to be skipped, sorted."""
    path.write_text(json.dumps(known, indent=1, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def _walk(chosen: Sequence[Environment], maker: Maker, names: Sequence[str] | None) -> int:
    """Run scripts, print a table, and return the exit status."""
    rows = []
    for base in chosen:
        for script in SCRIPTS:
            if names and script.name not in names:
                continue
            ready = maker(environment_of(script, base))
            print(f"{script.name}: {', then '.join(map(str, script.steps))}", flush=True)
            walked = walk(script, ready)
            for page, reason in walked.left_out.items():
                print(f"{script.name}: {page} is left out: {reason}", flush=True)
            print(
                f"{script.name}: {walked.wrong or 'runs'} ({walked.seconds / 60:.1f} minutes; {walked.log})", flush=True
            )
            rows.append(row_of_walk(ready, walked))
    write_report(FOLDER / "walks.json", rows)
    print("", table_of_walks(rows), sep="\n")
    return int(any(row["wrong"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
