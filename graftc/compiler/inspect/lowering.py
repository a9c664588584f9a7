"""The outcome of lowering a training graph: the sites that each step rewrites, and why it skips the others."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from graftc.compiler.inspect.snapshot import Snapshot
from graftc.passes.lowering.lower import lower
from graftc.passes.lowering.step_outcome import LoweringOutcome


@dataclass(frozen=True)
class Lowered:
    """The outcomes of every step; printing it shows a table.

    Attributes:
        outcomes: one outcome for each step and site, in the order of the graph's edits.
    """

    outcomes: tuple[LoweringOutcome, ...]

    def to_json(self) -> list[dict[str, Any]]:
        """Return the outcomes as plain values."""
        return [asdict(outcome) for outcome in self.outcomes]

    def rows(self) -> Iterator[tuple[str, str, str, str]]:
        """Yield table lines of the step, the number of sites, their outcome, and the first of them."""
        groups: dict[tuple[str, str], list[str]] = {}
        for outcome in self.outcomes:
            groups.setdefault((outcome.step, outcome.reason if not outcome.done else ""), []).append(outcome.place)
        for (step, reason), places in groups.items():
            yield step, str(len(places)), f"left as they are: {reason}" if reason else "rewritten", places[0]

    def __str__(self) -> str:
        lines = [COLUMNS, *self.rows()]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        padded = ("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)) for line in lines)
        return "\n".join(line.rstrip() for line in padded)


COLUMNS = ("step", "sites", "outcome", "first")
"""Names of the columns of `Lowered.rows`."""


def lowering(snapshot: Snapshot) -> Lowered:
    """Return the outcomes of the steps that the spec leaves on, for the training graph of the first signature."""
    return Lowered(tuple(lower(snapshot.program("train"), snapshot.spec)[1]))
