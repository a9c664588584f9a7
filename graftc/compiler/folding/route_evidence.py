"""Compare a folded model's routing choices: how often they differ, and how close the scores were."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from graftc.compiler.folding.differences import largest_difference, largest_number
from graftc.passes.core.ops.route import RouteChoice
from graftc.records.certificate import RouteEvidence

TIMES = 4.0
"""How far apart two scores may be for rounding to swap them, in multiples of a score's noise: an output may differ by
twice the effect of a different rounding, and each of the two scores may move by that much."""


def worse(one: RouteEvidence, other: RouteEvidence) -> RouteEvidence:
    """Return the worse of two comparisons of the same choice."""
    return max(one, other, key=lambda item: (not item.passed, item.distance, item.flips))


@dataclass(frozen=True)
class Flips:
    """The number of choices that differ between two runs whose scores are the same up to rounding.

    Attributes:
        choices, flips, gap: as for `RouteEvidence`.
    """

    choices: int
    flips: int
    gap: float

    @classmethod
    def between(cls, before: RouteChoice, after: RouteChoice) -> Flips:
        """Return the comparison of one choice in two runs; if shapes differ, every row counts as a different choice."""
        rows = before.chosen.shape[:-1].numel()
        if before.scores.shape != after.scores.shape or before.chosen.shape != after.chosen.shape:
            return cls(rows, rows, float("inf"))
        if not before.chosen.numel():
            return cls(rows, 0, 0.0)
        first, second = before.chosen, after.chosen.to(before.chosen.device)
        ordered = first.shape[-1] == before.scores.shape[-1]
        apart = (first != second).any(-1) if ordered else (_sorted(first) != _sorted(second)).any(-1)
        flips = int(apart.sum())
        if not flips:
            return cls(rows, 0, 0.0)
        scores = (before.scores, after.scores.to(before.scores.device))
        gaps = [(_ordered_gap if ordered else _gap)(s[apart].double(), first[apart], second[apart]) for s in scores]
        return cls(rows, flips, float(torch.stack(gaps).max()))


def score_noise(scores: Tensor, dtype: torch.dtype) -> float:
    """Return the smallest rounding error to expect in scores: a unit in the last place of the largest score.

    Args:
        scores: the scores to choose among.
        dtype: the dtype in which the model computes. Scores may have a wider dtype, but are computed from values in
            this one.
    """
    return max(torch.finfo(each).eps for each in (scores.dtype, dtype)) * largest_number(scores)


def moved(before: Mapping[str, RouteChoice], after: Mapping[str, RouteChoice]) -> dict[str, float]:
    """Return the largest difference between two runs' scores, by name."""
    both = [name for name in before if name in after and before[name].scores.shape == after[name].scores.shape]
    return {name: largest_difference(before[name].scores, after[name].scores) for name in both}


def _sorted(numbers: Tensor) -> Tensor:
    return numbers.sort(-1).values


def _gap(scores: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """Return the largest gap in any row between a score chosen only by one side and one chosen only by the other."""
    mine, theirs = (torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, own, True) for own in (first, second))
    one, other = mine & ~theirs, theirs & ~mine
    inf = float("inf")
    most = [torch.where(own, scores, -inf).amax(-1) for own in (one, other)]
    least = [torch.where(own, scores, inf).amin(-1) for own in (one, other)]
    return torch.maximum(most[0] - least[1], most[1] - least[0]).max()


def _ordered_gap(scores: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """Return the largest difference between two scores at the same position in two orderings."""
    return (scores.gather(-1, first) - scores.gather(-1, second)).abs().max()
