"""What stored cells lack: those that are missing, and those whose code or whose place in the plan has changed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from experiments.cells import Cell, canonical, code_digest
from experiments.plans import parts
from experiments.store import FOLDER, Record, Store

_SHOWN = 3
"""How many cells of a part are named."""


def stale(records: Iterable[Record], folder: Path = FOLDER) -> list[str]:
    """Return a line for each record whose code has changed, or whose cell is not planned any more.

    A new version of a library alone makes no record stale: its figures are those of the versions that it names.
    """
    lines, every = [], parts()
    planned = {name: {_key(cell) for cell in part.plan(Store(name, folder).known)} for name, part in every.items()}
    for record in records:
        part = every[record.cell.part]
        if _key(record.cell) not in planned[part.name]:
            lines.append(f"{record.cell}: not planned any more")
        elif record.sources.code != code_digest(part, record.cell):
            lines.append(f"{record.cell}: its method's modules, or those of the experiment, have changed")
    return lines


def gaps(folder: Path = FOLDER) -> Iterator[str]:
    """Yield a line for each part of which cells are missing or stale, and for cells without times.

    Raises:
        StoreError: if a file is damaged.
    """
    for name, part in parts().items():
        store = Store(name, folder)
        records = store.records()
        stored = {_key(record.cell) for record in records.values()}
        missing = [str(cell) for cell in part.plan(store.known) if _key(cell) not in stored]
        if missing:
            yield f"{name}: {len(missing)} cells are missing: {_some(missing)}"
        if old := stale(records.values(), folder):
            yield f"{name}: {len(old)} cells are out of date: {_some(old)}"
        times = store.times_of()
        if untimed := [str(record.cell) for digest, record in records.items() if digest not in times]:
            yield f"{name}: {len(untimed)} cells have no times: {_some(untimed)}"


def _some(names: list[str]) -> str:
    return ", ".join([*names[:_SHOWN], *(["..."] if len(names) > _SHOWN else [])])


def _key(cell: Cell) -> str:
    """Return a cell as text, for the newest versions without what these are at the moment."""
    settings = dict(cell.settings)
    if cell.part == "drift" and "/newest/" in cell.name:
        settings.pop("environment", None)
    return canonical(replace(cell, settings=settings).to_json())
