"""What the steps of lowering find in a training graph: which sites they rewrite, and why not the others."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from graftc.compiler.inspect.snapshot import Snapshot
from graftc.passes.lowering.lower import lower
from graftc.passes.lowering.outcome import LoweringOutcome


@dataclass(frozen=True)
class Lowered:
    """What every step found; print it to read it.

    Attributes:
        outcomes: one for each step and site, in the order of the graph's edits.
    """

    outcomes: tuple[LoweringOutcome, ...]

    def to_json(self) -> list[dict[str, Any]]:
        """Plain values."""
        return [asdict(outcome) for outcome in self.outcomes]

    def rows(self) -> Iterator[tuple[str, str, str, str]]:
        """Lines of a table: the step, how many sites, what became of them, and the first of them."""
        found: dict[tuple[str, str], list[str]] = {}
        for outcome in self.outcomes:
            found.setdefault((outcome.step, outcome.reason if not outcome.done else ""), []).append(outcome.place)
        for (step, reason), places in found.items():
            yield step, str(len(places)), f"left as they are: {reason}" if reason else "rewritten", places[0]

    def __str__(self) -> str:
        lines = [COLUMNS, *self.rows()]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        padded = ("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)) for line in lines)
        return "\n".join(line.rstrip() for line in padded)


COLUMNS = ("step", "sites", "outcome", "first")
"""Names of the columns of `Lowered.rows`."""


def lowering(snapshot: Snapshot) -> Lowered:
    """What the steps that the spec leaves on find in the training graph of the first signature."""
    return Lowered(tuple(lower(snapshot.program("train"), snapshot.spec)[1]))
