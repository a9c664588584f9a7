"""A part whose cells need no model, in a process that kills itself at a given point."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from experiments import store
from experiments.__main__ import ended_by
from experiments.cells import Cell, Known, Part
from experiments.running import run

COUNT = 6
POINTS = ("first", "middle", "last", "half a line", "before the rename")
"""Of the run at which it is killed: before the first, the middle or the last cell is complete, and so on."""
_NUMBERS = {"first": "0", "middle": "3", "last": str(COUNT - 1)}


def figures(cell: dict[str, Any]) -> dict[str, Any]:
    """Return a figure; kill the process at the cell that the environment names, or wait there."""
    if os.environ.get("GRAFTC_TESTS_KILL") == cell["name"]:
        kill()
    if (place := os.environ.get("GRAFTC_TESTS_WAIT")) is not None:
        Path(place, str(os.getpid())).touch()
        time.sleep(600)
    return {"value": int(cell["name"]) / 7}


def files(cell: Cell) -> tuple[Path, ...]:
    return ()


def fixed(cells: tuple[Cell, ...]) -> Callable[[Known], tuple[Cell, ...]]:
    """Return a plan that does not depend on figures."""
    return lambda known: cells


def nothing(cell: Cell) -> None:
    """No figures are known."""


def part(count: int = COUNT) -> Part:
    cells = (Cell("fake", str(number), "lora", "none", "float32", 0.1, 0, 1) for number in range(count))
    return Part("fake", "tests.experiments.fakes:figures", "tests.experiments.fakes:files", fixed(tuple(cells)))


def kill(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _half_lines_after(count: int) -> Callable[[Path, str], None]:
    """Return a way to append lines that writes half of one after a number of lines, and kills the process."""
    whole, written = store.append, [0]

    def append(path: Path, line: str) -> None:
        if written[0] == count:
            whole(path, line[: len(line) // 2])
            kill()
        written[0] += 1
        whole(path, line)

    return append


def main(folder: str, point: str) -> None:
    word, _, jobs = point.partition(" ")
    if word == "interrupted":
        # A shell starts what it runs in the background with SIGINT ignored, which children inherit.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        ended_by(lambda: run(part(), jobs=int(jobs), folder=Path(folder)))
    if point == "waiting":
        run(part(), jobs=2, folder=Path(folder))
    elif point in _NUMBERS:
        os.environ["GRAFTC_TESTS_KILL"] = _NUMBERS[point]
    elif point == "half a line":
        store.append = _half_lines_after(7)  # two lines a cell: its times, then its figures
    else:
        Path.replace = kill  # type: ignore[assignment, method-assign]
    run(part(), folder=Path(folder))


if __name__ == "__main__":
    main(*sys.argv[1:])
