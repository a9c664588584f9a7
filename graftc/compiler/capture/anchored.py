"""How a graph compares with the model that it was captured from."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from graftc.passes.core.ir.program_key import Mode


@dataclass(frozen=True)
class Anchor:
    """How a base graph compares with the source model itself, on the same inputs.

    Attributes:
        inputs: what both were called with: names of tensors, and flags.
        mode: train or eval.
        difference: the largest difference of any output or updated buffer, over the largest element of it: 0 where all
            are equal to the bit, infinite where one has another type or shape; None where it was not looked at.
        bound: what `difference` may be.
        skipped: why it was not looked at; empty where it was.
        differing: what is beyond the bound, for people.
        seconds: how long it took.
        assigned: attributes of modules that the forward pass assigned.
        plain: whether it could be run on plain inputs only, all ones, with the sizes that it was captured with.
        from_two: named sizes of which 1 is special to the model, so that the graph is for those from 2.
    """

    inputs: str
    mode: Mode
    difference: float | None
    bound: float
    skipped: str = ""
    differing: tuple[str, ...] = ()
    seconds: float = field(default=0.0, compare=False)
    assigned: tuple[str, ...] = ()
    plain: bool = False
    from_two: tuple[str, ...] = ()

    @property
    def exact(self) -> bool:
        """Whether all outputs are equal to the bit."""
        return self.difference == 0

    @property
    def passed(self) -> bool:
        """Whether nothing contradicts that the graph is the model."""
        return not self.differing

    def to_json(self) -> dict[str, Any]:
        """What was found, as JSON data, without what depends on how fast a machine is."""
        return {
            "inputs": self.inputs,
            "mode": self.mode,
            "difference": self.difference,
            "bound": self.bound,
            "exact": self.exact,
            "skipped": self.skipped,
        }
