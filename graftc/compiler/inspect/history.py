"""List a Program's history: the effect of every pipeline step, as rows."""

from __future__ import annotations

from dataclasses import replace
from itertools import takewhile

from graftc.compiler.inspect.snapshot import Snapshot
from graftc.passes.core.ir.history import HistoryEntry
from graftc.passes.core.ir.program import provenance
from graftc.passes.core.ir.program_key import Mode
from graftc.passes.lowering.lower import lower
from graftc.records.graphs import HistoryRow

CAPTURE = "capture"
"""The step in which base nodes are created."""

_VERIFY, _INSERT = "verify", "insert("


def history(snapshot: Snapshot, mode: Mode = "eval", *, lowered: bool = False) -> tuple[HistoryRow, ...]:
    """Return the steps from the capture to a mode's adapted Program; verifier runs become flags on the preceding rows.

    Args:
        snapshot: the Compilation.
        mode: the mode of the Program.
        lowered: whether to include, in train mode, the steps that lower the Program to the form that runs.
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
            # Changing the mode also removes inserted nodes, so count what is left in the graph itself.
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
