"""Running of many seeds, each in a process of its own, with limits; a run that was killed resumes.

Results are lines of JSON, each written as soon as its seed is done.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

from tools.forked import Job, Record, confine, run_forked
from tools.jsonl import append_line, read_lines
from tools.sources import ROOT, digest_with

RESULTS = ROOT / "build" / "campaign" / "results.jsonl"


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
    own = [path for path in Path(__file__).parent.glob("*.py") if path.name not in _APART]
    return digest_with(sorted(own), 12)


def stored(path: Path, key: str | None = None) -> dict[int, Record]:
    """Return the results of a file by seed, the last of each; a line that was cut off by a kill is left out.

    Args:
        path: the file; it may be missing.
        key: the state whose results count; None for any.
    """
    return {record["seed"]: record for record in read_lines(path) if key is None or record.get("state") == key}


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
    if results:
        tell(f"{len(results)} of {len(seeds)} seeds are done")
    forked = run_forked(
        [seed for seed in seeds if seed not in results],
        _confined,
        [only, limits, work or _work],
        first=lambda seed: {"seed": seed, "checks": {}},
        died=_died,
        late=lambda job: _late(job, limits),
        jobs=jobs,
        preload=preload,
    )
    with closing(forked):
        for job, outcome in forked:
            record = {**outcome, "seconds": round(job.seconds, 1), "state": key}
            append_line(path, record)
            results[job.item] = record
            tell(line(record))
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


def _confined(sender: Connection, seed: int, only: str | None, limits: Limits, work: Callable[..., None]) -> None:
    confine(limits.memory)
    work(sender, seed, only, limits)


def _died(job: Job[int]) -> Record:
    """Return the record of a process that ended early; what it had found before counts."""
    if job.record.get("findings"):
        return job.record
    message = f"the process ended with {job.ending}"
    return job.record | {"outcome": "died", "findings": {"process": {"message": message}}}


def _late(job: Job[int], limits: Limits) -> Record | None:
    """Return the record of a seed that has had its time; one that reduces what it has found has more."""
    if job.record.get("findings"):
        return job.record if job.seconds > 2 * limits.seconds + limits.minimising else None
    if job.seconds <= limits.seconds:
        return None
    message = f"takes longer than {limits.seconds:.0f} s at {job.record.get('step', 'compiling')}"
    return job.record | {"outcome": "timeout", "findings": {"time": {"message": message}}}
