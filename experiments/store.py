"""Stored cells: one JSON Lines file for the figures of a part, and one for the times, which differ between runs.

A line is appended as soon as its cell is complete, so that a killed run loses the cell under way at most.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from experiments.cells import Cell, Sources, canonical

FOLDER = Path(__file__).parent / "cells"
T = TypeVar("T")


@dataclass(frozen=True)
class Record:
    """A cell with its figures.

    Attributes:
        cell: the cell.
        sources: what its figures depended on when they were computed.
        figures: the figures, the same in every run on one machine.
    """

    cell: Cell
    sources: Sources
    figures: Mapping[str, Any]

    @property
    def digest(self) -> str:
        """The digest of the cell with its sources."""
        return self.sources.digest(self.cell)

    def line(self) -> str:
        """Return the record as a line of a file."""
        sources = {"code": self.sources.code, "data": self.sources.data, "versions": dict(self.sources.versions)}
        return sealed({"digest": self.digest, "cell": self.cell.to_json(), **sources, "figures": dict(self.figures)})


class StoreError(ValueError):
    """A file of cells, or a line of it, that cannot be used; the message begins with the file."""


def sealed(content: Mapping[str, Any]) -> str:
    """Return a line with a checksum of its content, which shows what was damaged or written by hand."""
    return canonical({**content, "check": _checksum(content)}) + "\n"


def unsealed(line: str) -> dict[str, Any]:
    """Return the content of a line.

    Raises:
        ValueError: if the line is not JSON, or its content does not have its checksum.
    """
    content = json.loads(line)
    if not isinstance(content, dict) or content.pop("check", None) != _checksum(content):
        raise ValueError("the line does not have the checksum of its content")
    return content


def _checksum(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(canonical(content).encode()).hexdigest()[:16]


def record_of(line: str) -> Record:
    """Return the record of a line.

    Raises:
        ValueError: if the line is damaged, or its digest is not that of its content.
    """
    data = unsealed(line)
    try:
        sources = Sources(data["code"], data["data"], data["versions"])
        record = Record(Cell(**data["cell"]), sources, data["figures"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"not a record of a cell: {error}") from None
    if record.digest != data["digest"]:
        raise ValueError(f"{record.cell} does not have the digest {data['digest']}")
    return record


class Store:
    """The files of a part in a folder: ``<part>.jsonl`` and ``<part>.times.jsonl``."""

    def __init__(self, part: str, folder: Path = FOLDER) -> None:
        self.part, self.path = part, folder / f"{part}.jsonl"
        self.times = folder / f"{part}.times.jsonl"
        self._by_cell: dict[str, Record] | None = None

    def records(self) -> dict[str, Record]:
        """Return the records by their digests. A last line without an end is left out.

        Raises:
            StoreError: if the file or a line of it is damaged.
        """
        return {record.digest: record for record in _read(self.path, self._own)}

    def _own(self, line: str) -> Record:
        record = record_of(line)
        if record.cell.part != self.part:
            raise ValueError(f"{record.cell} is a cell of another part")
        return record

    def record(self, cell: Cell) -> Record | None:
        """Return the record of a cell, whatever it was computed from; None if there is none. The file is read once."""
        if self._by_cell is None:
            self._by_cell = {canonical(record.cell.to_json()): record for record in self.records().values()}
        return self._by_cell.get(canonical(cell.to_json()))

    def known(self, cell: Cell) -> Mapping[str, Any] | None:
        """Return the figures of a cell as for `record`."""
        record = self.record(cell)
        return None if record is None else record.figures

    def times_of(self) -> dict[str, dict[str, Any]]:
        """Return the times by the digests of their cells. Errors as for `records`."""
        return {times["digest"]: times for times in _read(self.times, unsealed)}

    def mend(self) -> None:
        """Remove the incomplete last line that a killed run leaves."""
        for path in (self.path, self.times):
            content = path.read_bytes() if path.is_file() else b""
            if content and not content.endswith(b"\n"):
                replace(path, content[: content.rfind(b"\n") + 1])

    def add(self, record: Record, times: Mapping[str, Any]) -> None:
        """Append a record and its times, and wait until they are on the disk."""
        append(self.times, sealed({"digest": record.digest, **times}))
        append(self.path, record.line())

    def tidy(self, planned: Sequence[tuple[Cell, str]], prune: bool = False) -> int:
        """Put the records into the order of the plan, and return how many records are not in the plan.

        A record that its code, data and versions no longer give is dropped once the cell has been computed again.

        Args:
            planned: the plan's cells with their digests, in order.
            prune: whether to drop the records of cells that are not in the plan; by default they come last.
        """
        waiting: dict[str, list[Record]] = {}
        for record in self.records().values():
            waiting.setdefault(canonical(record.cell.to_json()), []).append(record)
        kept: list[Record] = []
        for cell, digest in planned:
            own = waiting.pop(canonical(cell.to_json()), [])
            kept += [record for record in own if record.digest == digest] or own
        others = [record for own in waiting.values() for record in own]
        kept += [] if prune else others
        times = self.times_of()
        replace(self.path, "".join(record.line() for record in kept).encode())
        timed = (times[record.digest] for record in kept if record.digest in times)
        replace(self.times, "".join(map(sealed, timed)).encode())
        return len(others)


def _read(path: Path, read: Callable[[str], T]) -> Iterator[T]:
    """Yield what a function reads from each complete line of a file; nothing if there is no file."""
    try:
        lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    except OSError as error:
        raise StoreError(f"{path}: {error.strerror}") from None
    for number, line in enumerate(lines, start=1):
        try:
            yield read(line.decode())
        except ValueError as error:
            raise StoreError(f"{path}:{number}: {error}") from None


def append(path: Path, line: str) -> None:
    """Append a line to a file, and wait until it is on the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8", newline="\n") as file:
        file.write(line)
        file.flush()
        os.fsync(file.fileno())


def replace(path: Path, content: bytes) -> None:
    """Replace the content of a file at once: whoever reads it, or stops this, finds the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = path.with_suffix(".staged")
    try:
        with staged.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        staged.replace(path)
    finally:
        staged.unlink(missing_ok=True)
