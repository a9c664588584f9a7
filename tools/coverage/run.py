"""Parallel examination of many entries, each in a process of its own; a run that was killed can be resumed."""

from __future__ import annotations

import json
import os
import platform
import signal
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path

from tools.coverage.catalogue import Entry
from tools.forked import Job, Record, run_forked
from tools.sources import ROOT, digest_with

WORK = ROOT / "build" / "coverage"
MEMORY = 6 << 30
SECONDS = 300
SOURCES = (
    "build",
    "catalogue",
    "diffusion",
    "examine",
    "fields",
    "images_in_text",
    "inputs",
    "levels",
    "libraries",
    "lookup",
    "shrink",
    "text",
)
"""The modules of this package that a record depends on."""

LIBRARIES = ("diffusers", "timm", "torch", "torchvision", "transformers")
"""The packages that records depend on, apart from graftc."""


@dataclass(frozen=True)
class Limits:
    """The limits of one entry: bytes of memory, seconds of CPU time, and seconds of wall-clock time."""

    memory: int = MEMORY
    seconds: int = SECONDS
    patience: int = 10 * SECONDS


def versions() -> dict[str, str]:
    """Return the versions that a record depends on."""
    python = ".".join(platform.python_version_tuple()[:2])
    return {name: version(name) for name in ("graftc", *LIBRARIES)} | {"python": python}


def digest() -> str:
    """Return a short hash of graftc's sources and of the code that examines."""
    return digest_with([ROOT / "tools" / "coverage" / f"{name}.py" for name in SOURCES], 16)


@dataclass
class Kept:
    """Records on disk, one file per entry, each with the key of the state that it was made in.

    Attributes:
        folder: the folder of the files.
        key: the key of the current state; records with other keys are not used.
        any_key: whether to use records with any key, to look at an earlier run.
    """

    folder: Path
    key: str
    any_key: bool = False

    def read(self, entry: Entry) -> Record | None:
        """Return the record of an entry; None if it is missing, incomplete or of another state."""
        try:
            stored = json.loads(self._path(entry).read_text())
        except (OSError, ValueError):
            return None
        same = stored.get("key") == self.key or self.any_key
        return stored["record"] if same and stored.get("entry") == json.loads(json.dumps(asdict(entry))) else None

    def write(self, entry: Entry, record: Record) -> None:
        """Store a record; a reader sees the old file or the new one, never a part."""
        self._path(entry).parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"key": self.key, "entry": asdict(entry), "record": record}, indent=1)
        part = self._path(entry).with_suffix(f".{os.getpid()}.part")
        part.write_text(text)
        part.replace(self._path(entry))

    def forget(self, whether: Callable[[Record], bool], entries: Sequence[Entry]) -> None:
        """Delete the records for which ``whether`` returns true."""
        for entry in entries:
            record = self.read(entry)
            if record is not None and whether(record):
                self._path(entry).unlink()

    def _path(self, entry: Entry) -> Path:
        return self.folder / f"{entry.name}.json"


def state() -> str:
    """Return the key of the installed versions and the current sources."""
    return f"{digest()} " + " ".join(f"{name} {number}" for name, number in sorted(versions().items()))


def examine_all(
    entries: Sequence[Entry],
    kept: Kept,
    *,
    jobs: int = 1,
    limits: Limits | None = None,
    tell: Callable[[str], None] = print,
) -> dict[str, Record]:
    """Return the records of all entries by class name: kept ones unchanged, the others examined now.

    Args:
        entries: the entries to examine.
        kept: the store of records; every new one is written to it as soon as it is made.
        jobs: the number of processes at a time.
        limits: the limits of each entry.
        tell: called with one line per entry.
    """
    records = {e.name: record for e in entries if (record := kept.read(e)) is not None}
    todo = [e for e in entries if e.name not in records]
    if records:
        tell(f"{len(records)} of {len(entries)} kept from before")
    limits = limits or Limits()
    forked = run_forked(
        todo,
        _work,
        [limits],
        first=Entry.facts,
        died=lambda job: _died(job, _death(job, limits)),
        late=lambda job: _late(job, limits),
        jobs=jobs,
        preload=("tools.coverage.run", "tools.coverage.worker"),
    )
    with closing(forked):
        for done, (job, record) in enumerate(forked, 1):
            kept.write(job.item, record)
            records[job.item.name] = record
            tell(f"[{done}/{len(todo)}] {line(record)}")
    return {e.name: records[e.name] for e in entries}


def line(record: Record) -> str:
    """Return a record as one line of text."""
    if record.get("folds"):
        outcome = "folds"
    elif not record["built"]:
        outcome = "not built"
    elif not record["captured"]:
        outcome = "not captured"
    else:
        outcome = "FAILS" if record.get("attention") else "no attention"
    reason = f": {record['reason']}" if record.get("reason") else ""
    return f"{record['class']} ({record.get('_seconds', '?')} s) {outcome}{reason}"


def _work(sender: Connection, entry: Entry, limits: Limits) -> None:
    """Run the worker: the server's forks call this function, while the process of this module never imports torch."""
    from tools.coverage.worker import work

    work(sender, entry, limits.memory, limits.seconds)


def _late(job: Job[Entry], limits: Limits) -> Record | None:
    return _died(job, f"takes longer than {limits.patience} s") if job.seconds > limits.patience else None


def _death(job: Job[Entry], limits: Limits) -> str:
    if job.process.exitcode in (-signal.SIGXCPU, -signal.SIGKILL):
        return f"takes longer than {limits.seconds} s of CPU time"
    return f"the process dies ({job.ending})"


def _died(job: Job[Entry], reason: str) -> Record:
    record = dict(job.record)
    step = record.pop("_step", "building it")
    if record.get("captured"):
        record["folds"] = False
    return record | {"reason": f"{step} {reason}", "_died": True}
