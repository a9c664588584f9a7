"""Tolerances, and the comparison of outputs: the only place that says what counts as equal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

DOUBLE = 1e-9
"""Where everything is computed in float64, as a fraction of the largest output."""
SLOPE = 1e-5
"""Of the slope of a loss along a line, by finite differences in float64."""
SINGLE = 1e-4
"""Where the model, or ONNX Runtime, computes in float32."""
SINGLE_INSIDE = 1e-5
"""Where a float64 model of transformers casts to float32 in its norms or rotations."""
DRAWN = 1e-7
"""Where a float64 model starts as its base by a product of factors that are drawn in float32 and cancel."""
CASTING = frozenset({"llama", "mixtral", "t5", "gpt_neox"})
"""The families that do so."""


def tolerance_of(family: str | None) -> float:
    """Return the tolerance of a float64 model of a family; None for one of the grammar."""
    return SINGLE_INSIDE if family in CASTING else DOUBLE


@dataclass(frozen=True)
class Comparison:
    """Computed tensors and the expected ones.

    Attributes:
        label: what was computed.
        actual: its tensors.
        expected: what they have to be.
        tolerance: the bound of `apart`.
    """

    label: str
    actual: Sequence[Tensor]
    expected: Sequence[Tensor]
    tolerance: float

    @property
    def figure(self) -> float:
        """The largest difference, as `apart` returns it."""
        return apart(self.actual, self.expected)

    @property
    def equal(self) -> bool:
        """Whether they are equal within the tolerance; NaN never is."""
        return self.figure <= self.tolerance


def apart(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Return the largest difference as a fraction of the largest value that is expected.

    The result is infinite for other numbers of tensors, other shapes, and for NaN on either side.
    """
    if not expected or len(actual) != len(expected):
        return float("inf")
    worst, largest = 0.0, 0.0
    for a, b in zip(actual, expected, strict=True):
        if a.shape != b.shape:
            return float("inf")
        a, b = a.detach().double(), b.detach().double()
        if a.numel() == 0 or torch.equal(a, b):
            largest = max(largest, float(b.abs().max()) if b.numel() else 0.0)
            continue
        gap = float((a - b).abs().max())
        if gap != gap:
            return float("inf")
        worst, largest = max(worst, gap), max(largest, float(b.abs().max()))
    return worst / max(largest, 1e-30)


def record_of(comparisons: Sequence[Comparison]) -> dict[str, Any]:
    """Return the record of a check: ``equal``, or ``difference`` with what is farthest from its bound."""
    if not comparisons:
        return {"status": "nothing"}
    worst = max(comparisons, key=lambda each: each.figure / each.tolerance)
    status = "equal" if all(each.equal for each in comparisons) else "difference"
    return {"status": status, "figure": worst.figure, "label": worst.label}
