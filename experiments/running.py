"""Run the cells of a part that are not stored yet, one after the other or in several processes."""

from __future__ import annotations

import multiprocessing
import os
import platform
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from pathlib import Path
from typing import Any

from experiments.cells import Cell, Part, Sources, canonical, compute, sources_of
from experiments.store import FOLDER, Record, Store

Outcome = tuple[dict[str, Any], dict[str, Any]]
"""The figures of a cell, and its times."""


def run(part: Part, *, only: str | None = None, jobs: int = 1, folder: Path = FOLDER, prune: bool = False) -> int:
    """Compute and store the cells of a part that are missing, and return how many failed.

    Args:
        part: the part.
        only: a regular expression; other cells are not computed, and keep what is stored.
        jobs: number of processes, each with one thread.
        folder: where the files are.
        prune: whether stored cells that the part does not plan are dropped at the end.

    Raises:
        StoreError: if a file is damaged.
    """
    store = Store(part.name, folder)
    store.mend()
    current = _Current(part, store.records())
    failed: set[str] = set()
    while True:
        planned = part.plan(current.figures)
        chosen = [cell for cell in planned if only is None or re.search(only, str(cell))]
        missing = [cell for cell in chosen if current.figures(cell) is None and current.digest(cell) not in failed]
        _tell(f"{part.name}: {len(chosen) - len(missing) - len(failed)} of {len(chosen)} cells are stored")
        if not missing:
            break
        for number, (cell, outcome) in enumerate(_outcomes(part, missing, jobs), start=1):
            if isinstance(outcome, Exception):
                failed.add(current.digest(cell))
                _tell(f"[{number}/{len(missing)}] {cell}: {type(outcome).__name__}: {outcome}")
                continue
            figures, times = outcome
            current.add(record := Record(cell, current.sources(cell), figures))
            store.add(record, times)
            _tell(f"[{number}/{len(missing)}] {cell}: {times['seconds']} s")
    others = store.tidy([(cell, current.digest(cell)) for cell in planned], prune)
    if others:
        _tell(f"{part.name}: {others} other cells are {'dropped' if prune else 'stored too; --prune drops them'}")
    return len(failed)


class _Current:
    """The stored cells of a part whose figures are still those that a run would compute."""

    def __init__(self, part: Part, records: Mapping[str, Record]) -> None:
        self._part, self._records = part, dict(records)
        self._sources: dict[str, Sources] = {}

    def sources(self, cell: Cell) -> Sources:
        """Return what the figures of a cell depend on."""
        key = canonical(cell.to_json())
        if key not in self._sources:
            self._sources[key] = sources_of(self._part, cell)
        return self._sources[key]

    def digest(self, cell: Cell) -> str:
        """Return the digest of a cell."""
        return self.sources(cell).digest(cell)

    def add(self, record: Record) -> None:
        """Add a cell that has been computed."""
        self._records[record.digest] = record

    def figures(self, cell: Cell) -> Mapping[str, Any] | None:
        """Return the figures of a cell; None if it has to be computed."""
        record = self._records.get(self.digest(cell))
        return None if record is None else record.figures


def _outcomes(part: Part, cells: Sequence[Cell], jobs: int) -> Iterator[tuple[Cell, Outcome | Exception]]:
    """Yield cells with their outcomes, as they are completed."""
    if jobs == 1:
        for cell in cells:
            yield cell, _attempt(partial(measured, part.compute, cell))
        return
    context = multiprocessing.get_context("spawn")
    # A process for each cell: what an earlier one left would count as memory of the next.
    options: dict[str, Any] = {"max_tasks_per_child": 1, "initializer": _end_with_the_parent}
    pool = ProcessPoolExecutor(jobs, mp_context=context, **options)
    try:
        waiting = {pool.submit(measured, part.compute, cell, own_process=True): cell for cell in cells}
        for future in as_completed(waiting):
            yield waiting[future], _attempt(future.result)
    finally:  # whoever interrupts a run does not wait for cells that nobody would store
        pool.shutdown(wait=False, cancel_futures=True)


def _end_with_the_parent() -> None:
    """End this process as soon as the run that started it ends, rather than compute cells that nobody stores."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of Ctrl-C the run tells
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _attempt(call: Callable[[], Outcome]) -> Outcome | Exception:
    """Return the result of a call, or the error by which it failed: other cells do not depend on it."""
    try:
        return call()
    except Exception as error:
        return error


def measured(function: str, cell: Cell, own_process: bool = False) -> Outcome:
    """Return the figures of a cell, and its seconds, machine and, in a process of its own, its peak memory."""
    _one_thread()
    started = time.perf_counter()
    figures = compute(function, cell)
    times = {
        "seconds": round(time.perf_counter() - started, 1),
        "peak_mb": _peak() if own_process else None,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        **figures.pop("times", {}),
    }
    return figures, times


def _one_thread() -> None:
    """Use one thread, on which the order of sums, and with it the last bits of figures, depends."""
    os.environ["OMP_NUM_THREADS"] = "1"
    if (torch := sys.modules.get("torch")) is not None:
        torch.set_num_threads(1)


def _peak() -> int | None:
    """Return the most memory that this process has had, in megabytes; None if it is not known."""
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
    except OSError:
        return None
    line = re.search(r"VmHWM:\s+(\d+) kB", status)
    return int(line[1]) // 1024 if line else None


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
