"""What steps of lowering say of their work."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LoweringOutcome:
    """What a step found at one place.

    Attributes:
        step: its name.
        place: a module path.
        done: whether the place was rewritten.
        reason: why not, for people; empty where it was.
    """

    step: str
    place: str
    done: bool
    reason: str = ""
