"""The result of comparing a graph with the model that it was captured from."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from graftc.passes.core.ir.program_key import Mode


@dataclass(frozen=True)
class Anchor:
    """The result of comparing a base graph with the source model itself, on the same inputs.

    Attributes:
        inputs: the arguments of both: names of tensors, and flags.
        mode: train or eval.
        difference: the largest difference of any output or updated buffer, relative to its largest element: 0 if all
            are equal to the bit, infinite if one has another type or shape; None if they were not compared.
        bound: the largest `difference` that is allowed.
        skipped: the reason why they were not compared; empty if they were.
        differing: descriptions of what exceeds the bound.
        seconds: the duration of the comparison.
        assigned: attributes of modules that the forward pass assigned.
        plain: whether both could be run on plain inputs only, all ones, with the sizes used for the capture.
        from_two: named sizes for which 1 is special to the model, so that the graph is valid from 2 on.
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
        """Whether nothing contradicts that the graph computes what the model does."""
        return not self.differing

    def to_json(self) -> dict[str, Any]:
        """Return the result as JSON data, without anything that depends on the speed of the machine."""
        return {
            "inputs": self.inputs,
            "mode": self.mode,
            "difference": self.difference,
            "bound": self.bound,
            "exact": self.exact,
            "skipped": self.skipped,
        }
