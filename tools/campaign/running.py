"""Running of many seeds, each in a process of its own, with limits; a run that was killed resumes.

Results are lines of JSON, each written as soon as its seed is done.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import resource
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "build" / "campaign" / "results.jsonl"
Record = dict[str, Any]


@dataclass(frozen=True)
class Limits:
    """The limits of one seed.

    Attributes:
        seconds: wall-clock time; minimising has as much again.
        memory: bytes of data that its process may allocate.
        minimising: seconds for reducing what failed; 0 to leave it as it is.
    """

    seconds: float = 120
    memory: int = 8 << 30
    minimising: float = 90


_APART = ("__main__.py", "minimising.py", "running.py", "worker.py")
"""Modules of this package that do not change how a seed ends."""


def state() -> str:
    """Return a short hash of the sources that a result depends on: graftc's, and those of this package."""
    total = hashlib.sha256()
    own = [path for path in Path(__file__).parent.glob("*.py") if path.name not in _APART]
    for path in sorted([*(ROOT / "graftc").rglob("*.py"), *own]):
        total.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes() + b"\0")
    return total.hexdigest()[:12]


def stored(path: Path, key: str | None = None) -> dict[int, Record]:
    """Return the results of a file by seed, the last of each; a line that was cut off by a kill is left out.

    Args:
        path: the file; it may be missing.
        key: the state whose results count; None for any.
    """
    results: dict[int, Record] = {}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return results
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if key is None or record.get("state") == key:
            results[record["seed"]] = record
    return results


def outcome_of(record: Record) -> str:
    """Return ``equal``, ``refused``, ``difference``, ``error``, ``timeout`` or ``died`` for a whole seed.

    A seed is refused if compiling it was; other refusals count by themselves.
    """
    if record.get("outcome"):
        return str(record["outcome"])
    statuses = [each["status"] for each in record["checks"].values()]
    for status in ("difference", "error"):
        if status in statuses:
            return status
    if record.get("findings"):
        return "error"
    return "refused" if record["checks"].get("compile", {}).get("status") == "refused" else "equal"


def counts_of(records: Iterable[Record]) -> dict[str, Counter[str]]:
    """Return how many seeds and checks ended in which way, and how many refusals had which code."""
    counts: dict[str, Counter[str]] = {name: Counter() for name in ("seeds", "checks", "codes", "references")}
    for record in records:
        counts["seeds"][outcome_of(record)] += 1
        counts["references"][record.get("reference", "none")] += 1
        for name, each in record.get("checks", {}).items():
            counts["checks"][f"{name} {each['status']}"] += 1
            if each["status"] == "refused":
                counts["codes"][f"{name} {each['code']}"] += 1
    return counts


@dataclass
class _Running:
    seed: int
    process: BaseProcess
    receiver: Connection
    started: float
    record: Record = field(default_factory=dict)


def run(
    seeds: Sequence[int],
    path: Path = RESULTS,
    *,
    jobs: int = 1,
    only: str | None = None,
    limits: Limits | None = None,
    any_state: bool = False,
    tell: Callable[[str], None] = print,
    work: Callable[..., None] | None = None,
    preload: Sequence[str] = ("tools.campaign.worker",),
) -> dict[int, Record]:
    """Return the results of seeds: those of the file unchanged, the others from running them now.

    Args:
        seeds: the seeds.
        path: the file to which results are appended.
        jobs: the number of processes at a time.
        only: the one route to take, instead of two drawn ones.
        limits: the limits of a seed.
        any_state: whether results of other sources count as well.
        tell: called with a line for each seed.
        work: the function that the processes run instead of the campaign's own, for tests.
        preload: the modules that the server of the processes imports once.
    """
    limits, key = limits or Limits(), state()
    results = {s: r for s, r in stored(path, None if any_state else key).items() if s in set(seeds)}
    todo = [seed for seed in reversed(seeds) if seed not in results]
    if results:
        tell(f"{len(results)} of {len(seeds)} seeds are done")
    path.parent.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(preload))
    running: list[_Running] = []
    try:
        with path.open("a", encoding="utf-8") as file:
            if path.stat().st_size and not path.read_bytes().endswith(b"\n"):
                file.write("\n")
            while todo or running:
                while todo and len(running) < jobs:
                    running.append(_start(context, todo.pop(), only, limits, work or _work))
                wait([item.receiver for item in running], timeout=1.0)
                for item in list(running):
                    if not _finished(item, limits):
                        continue
                    running.remove(item)
                    record = {**item.record, "seconds": round(time.monotonic() - item.started, 1), "state": key}
                    file.write(json.dumps(record) + "\n")
                    file.flush()
                    results[item.seed] = record
                    tell(line(record))
    finally:
        for item in running:
            item.process.kill()
            item.process.join()
    return {seed: results[seed] for seed in seeds}


def line(record: Record) -> str:
    """Return a record as one line of text."""
    parts = [f"{record['seed']}: {outcome_of(record)} ({record.get('seconds', '?')} s)"]
    for name, each in record.get("findings", {}).items():
        parts.append(f"{name}: {each.get('message') or each.get('figure')}")
    return "; ".join(parts)[:400]


def _work(sender: Connection, seed: int, only: str | None, limits: Limits) -> None:
    from tools.campaign.worker import work

    work(sender, seed, only, limits.minimising)


def _limited(sender: Connection, seed: int, only: str | None, limits: Limits, work: Callable[..., None]) -> None:
    resource.setrlimit(resource.RLIMIT_DATA, (limits.memory, limits.memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    silent = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silent, 1)
    os.dup2(silent, 2)
    work(sender, seed, only, limits)


def _start(context: Any, seed: int, only: str | None, limits: Limits, work: Callable[..., None]) -> _Running:
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_limited, args=(sender, seed, only, limits, work), daemon=True)
    process.start()
    sender.close()
    return _Running(seed, process, receiver, time.monotonic(), {"seed": seed, "checks": {}})


def _finished(item: _Running, limits: Limits) -> bool:
    """Receive what a process has sent; return whether it is done, out of time, or dead."""
    try:
        while item.receiver.poll():
            item.record = item.receiver.recv()
            if item.record.pop("done", False):
                item.process.join(timeout=5)
                return True
    except (EOFError, OSError):
        item.process.join(timeout=10)
        code = item.process.exitcode
        if not item.record.get("findings"):
            name = signal.Signals(-code).name if code is not None and code < 0 else f"exit {code}"
            item.record |= {"outcome": "died", "findings": {"process": {"message": f"the process ended with {name}"}}}
        return True
    allowed = limits.seconds + (limits.minimising + limits.seconds if item.record.get("findings") else 0)
    if time.monotonic() - item.started <= allowed:
        return False
    item.process.kill()
    item.process.join()
    if not item.record.get("findings"):
        message = f"takes longer than {limits.seconds:.0f} s at {item.record.get('step', 'compiling')}"
        item.record |= {"outcome": "timeout", "findings": {"time": {"message": message}}}
    return True
