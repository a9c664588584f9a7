"""Report the outcome of lowering a training graph: which sites each step rewrites, and why it skips the others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from graftc.compiler.inspect.snapshot import Snapshot
from graftc.passes.lowering.lower import lower
from graftc.records.graphs import OUTCOME_COLUMNS, LoweringOutcome, outcome_rows


@dataclass(frozen=True)
class Lowered:
    """The outcomes of all lowering steps; printed as a table.

    Attributes:
        outcomes: one outcome per step and site, in the order of the graph's edits.
    """

    outcomes: tuple[LoweringOutcome, ...]

    def to_json(self) -> list[dict[str, Any]]:
        """Return the outcomes as plain values."""
        return [outcome.to_json() for outcome in self.outcomes]

    def __str__(self) -> str:
        lines = [OUTCOME_COLUMNS, *outcome_rows(self.outcomes)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        padded = ("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)) for line in lines)
        return "\n".join(line.rstrip() for line in padded)


def lowering(snapshot: Snapshot) -> Lowered:
    """Return the outcomes of the steps that the spec enables, for the first signature's training graph."""
    return Lowered(tuple(lower(snapshot.program("train"), snapshot.spec)[1]))
