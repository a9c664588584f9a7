"""The history of a Program: what every step of the pipeline did to it, as rows."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from itertools import takewhile
from typing import Any

from graftc.compiler.inspect.snapshot import Snapshot
from graftc.passes.core.ir.history import HistoryEntry
from graftc.passes.core.ir.program import provenance
from graftc.passes.core.ir.program_key import Mode
from graftc.passes.lowering.lower import lower

CAPTURE = "capture"
"""The step that base nodes come from."""

_VERIFY, _INSERT = "verify", "insert("


@dataclass(frozen=True)
class HistoryRow:
    """One step of the pipeline.

    Attributes:
        step: name of the step.
        added, removed: number of nodes that the step added and removed.
        nodes: number of nodes after it.
        inserted: number of those nodes that adaptations inserted.
        verified: whether the verifier ran on its result.
        seconds: time that it took; None if unknown.
    """

    step: str
    added: int
    removed: int
    nodes: int
    inserted: int
    verified: bool
    seconds: float | None

    def to_json(self) -> dict[str, Any]:
        """Return the row as plain values."""
        return asdict(self)


def history(snapshot: Snapshot, mode: Mode = "eval", *, lowered: bool = False) -> tuple[HistoryRow, ...]:
    """Return the steps from the capture to the adapted Program of a mode; runs of the verifier are marks on other rows.

    Args:
        snapshot: the Compilation.
        mode: the mode of the Program.
        lowered: whether to include, in train mode, the steps that lower the Program to what is run.
    """
    program = snapshot.program(mode)
    # Both modes start from the graph captured in train mode.
    before = list(takewhile(lambda entry: entry.step != _VERIFY, program.history))
    captured = len(snapshot.program("train", base=True).graph.nodes) + sum(e.removed - e.added for e in before)
    entries = [HistoryEntry(CAPTURE, captured, 0, 0.0), *program.history]
    inserting = {own.name for own in snapshot.passes if own.rewrites}
    rows: list[HistoryRow] = []
    nodes = inserted = 0
    for index, entry in enumerate(entries):
        if entry.step == _VERIFY:
            continue
        nodes += entry.added - entry.removed
        inserted += entry.added if entry.step.startswith(_INSERT) or entry.step in inserting else 0
        if all(later.step == _VERIFY for later in entries[index + 1 :]):
            # Changing the mode also removes inserted nodes, so they are counted in the graph itself.
            inserted = sum(provenance(node) is not None for node in program.graph.nodes)
        verified = index + 1 < len(entries) and entries[index + 1].step == _VERIFY
        seconds = entry.seconds if entry.seconds > 0 else None
        rows.append(HistoryRow(entry.step, entry.added, entry.removed, nodes, inserted, verified, seconds))
    if lowered and mode == "train":
        run = lower(program, snapshot.spec)[0]
        for entry in run.history[len(program.history) :]:
            nodes += entry.added - entry.removed
            rows.append(HistoryRow(entry.step, entry.added, entry.removed, nodes, inserted, False, None))
        rows[-1] = replace(rows[-1], inserted=sum(provenance(node) is not None for node in run.graph.nodes))
    return tuple(rows)


def history_columns(rows: tuple[HistoryRow, ...]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Return the column names and lines of a table of `history`; times are included only if any are known."""
    timed = any(row.seconds is not None for row in rows)
    columns = ("step", "added", "removed", "nodes", "inserted", "verified", *(["seconds"] if timed else []))
    lines = []
    for row in rows:
        changes = (f"+{row.added}" if row.added else "", f"-{row.removed}" if row.removed else "")
        seconds = ([f"{row.seconds:.3f}" if row.seconds is not None else ""]) if timed else []
        line = (row.step, *changes, str(row.nodes), str(row.inserted), "yes" if row.verified else "", *seconds)
        lines.append(line)
    return columns, lines
