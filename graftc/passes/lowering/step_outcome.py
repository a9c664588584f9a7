"""The outcomes that steps of lowering report."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LoweringOutcome:
    """The outcome of a step at one place.

    Attributes:
        step: the name of the step.
        place: a module path.
        done: whether the place was rewritten.
        reason: why it was not, as a readable message; empty if it was.
    """

    step: str
    place: str
    done: bool
    reason: str = ""
