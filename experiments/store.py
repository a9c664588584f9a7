"""Stored cells: one JSON Lines file for the figures of a part, and one for the times, which differ between runs.

A line is appended as soon as its cell is complete, so that a killed run loses the cell under way at most.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.cells import Cell, Sources, canonical

FOLDER = Path(__file__).parent / "cells"


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
        content = {"digest": self.digest, "cell": self.cell.to_json(), **sources, "figures": dict(self.figures)}
        return canonical(content) + "\n"


def record_of(line: str) -> Record:
    """Return the record of a line.

    Raises:
        ValueError: if the line is damaged, or its digest is not that of its content.
    """
    data = json.loads(line)
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
        self.path = folder / f"{part}.jsonl"
        self.times = folder / f"{part}.times.jsonl"
        self._by_cell: dict[str, Record] | None = None

    def records(self) -> dict[str, Record]:
        """Return the records by their digests. A last line without an end is left out."""
        return {record.digest: record for record in map(record_of, whole_lines(self.path))}

    def record(self, cell: Cell) -> Record | None:
        """Return the record of a cell, whatever it was computed from; None if there is none. The file is read once."""
        if self._by_cell is None:
            self._by_cell = {canonical(record.cell.to_json()): record for record in self.records().values()}
        return self._by_cell.get(canonical(cell.to_json()))

    def known(self, cell: Cell) -> Mapping[str, Any] | None:
        """Return the figures of a cell as for `record`."""
        record = self.record(cell)
        return None if record is None else record.figures

    def time_lines(self) -> dict[str, str]:
        """Return the lines of the file of times by the digests of their cells."""
        return {json.loads(line)["digest"]: line for line in whole_lines(self.times)}

    def mend(self) -> None:
        """Remove the incomplete last line that a killed run leaves."""
        for path in (self.path, self.times):
            text = path.read_text(encoding="utf-8") if path.exists() else ""
            if text and not text.endswith("\n"):
                replace(path, text[: text.rfind("\n") + 1])

    def add(self, record: Record, times: Mapping[str, Any]) -> None:
        """Append a record and its times, and wait until they are on the disk."""
        append(self.times, canonical({"digest": record.digest, **times}) + "\n")
        append(self.path, record.line())

    def tidy(self, planned: Sequence[str]) -> None:
        """Put the records into the order of the plan, and drop those that it does not contain.

        Args:
            planned: the digests of the plan's cells, in order.
        """
        records = self.records()
        computed = [digest for digest in dict.fromkeys(planned) if digest in records]
        times = self.time_lines()
        replace(self.path, "".join(records[digest].line() for digest in computed))
        replace(self.times, "".join(times[digest] for digest in computed if digest in times))


def whole_lines(path: Path) -> Iterator[str]:
    """Yield the complete lines of a file; nothing if the file does not exist."""
    if path.exists():
        with path.open(encoding="utf-8", newline="\n") as lines:
            yield from (line for line in lines if line.endswith("\n"))


def append(path: Path, line: str) -> None:
    """Append a line to a file, and wait until it is on the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8", newline="\n") as file:
        file.write(line)
        file.flush()
        os.fsync(file.fileno())


def replace(path: Path, text: str) -> None:
    """Replace the content of a file at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = path.with_suffix(".staged")
    with staged.open("w", encoding="utf-8", newline="\n") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    staged.replace(path)
