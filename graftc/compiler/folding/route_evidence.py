"""Choices that a folded model makes otherwise: how many, and how near those were that it takes for one another."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from graftc.compiler.folding.differences import largest_difference, largest_number
from graftc.passes.core.ops.route import RouteChoice

TIMES = 4.0
"""How many times the noise of a score two scores may be apart that rounding exchanges: as outputs may differ by twice
what other roundings do, each of the two may move by as much."""


@dataclass(frozen=True)
class RouteEvidence:
    """The choices that one router makes (or whatever else chooses among values by their size), unfolded and folded.

    Attributes:
        choice: the node that chooses, as the base's graph names it.
        module: the module that it is in.
        choices: how many were compared: one for each row of scores, such as a token.
        flips: in how many of them the folded model would have chosen otherwise.
        gap: of those the largest distance, unfolded or folded, of a chosen score from one that the other side chose in
            its place.
        noise: how far scores move where folded weights are rounded otherwise, as far as that had to be tried: at least
            a unit in the last place of the largest score, in the model's type.
        bound: what the gap may be.
    """

    choice: str
    module: str
    choices: int
    flips: int = 0
    gap: float = 0.0
    noise: float = 0.0
    bound: float = 0.0

    @property
    def passed(self) -> bool:
        """Whether rounding explains what was chosen otherwise."""
        return not self.flips or self.gap <= self.bound

    def failure(self) -> str:
        """Why it did not pass, for people."""
        return (
            f"{self.module or 'the model'} chooses otherwise in {self.flips} of {self.choices} cases ({self.choice}), "
            f"of scores up to {self.gap:.2e} apart, and rounding explains {self.bound:.2e}"
        )

    def to_json(self) -> dict[str, Any]:
        """Everything, as JSON data."""
        gap = self.gap if math.isfinite(self.gap) else None
        return {**vars(self), "gap": gap, "passed": self.passed}


def worse(one: RouteEvidence, other: RouteEvidence) -> RouteEvidence:
    """Of two comparisons of one choice the one that says more against it."""
    return max(one, other, key=lambda item: (not item.passed, item.gap, item.flips))


def routed(routes: Sequence[RouteEvidence]) -> list[str]:
    """What routers choose otherwise in the folded model, for people: nothing where they choose the same."""
    other = [route for route in routes if route.flips]
    if not other:
        return []
    flips, choices = (sum(getattr(route, name) for route in routes) for name in ("flips", "choices"))
    worst = max(other, key=lambda route: route.gap / route.bound if route.bound else route.gap)
    return [
        f"{flips} of {choices} choices of routers are others, of scores at most {worst.gap:.1e} apart in "
        f"{worst.module or worst.choice}, where rounding explains {worst.bound:.1e}; outputs were compared with the "
        "same choices"
    ]


@dataclass(frozen=True)
class Flips:
    """What two runs chose otherwise from the same scores but for rounding.

    Attributes:
        choices, flips, gap: as for `RouteEvidence`.
    """

    choices: int
    flips: int
    gap: float

    @classmethod
    def between(cls, before: RouteChoice, after: RouteChoice) -> Flips:
        """Of one choice in two runs; of other shapes, everything is another choice."""
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
    """How far scores are at least from what they would be without rounding: a unit in the last place of the largest.

    Args:
        scores: what is chosen among.
        dtype: that the model computes in. Scores may be in a wider one, and are made from values in this one.
    """
    return max(torch.finfo(each).eps for each in (scores.dtype, dtype)) * largest_number(scores)


def moved(before: Mapping[str, RouteChoice], after: Mapping[str, RouteChoice]) -> dict[str, float]:
    """By name, how far the scores of two runs are apart."""
    both = [name for name in before if name in after and before[name].scores.shape == after[name].scores.shape]
    return {name: largest_difference(before[name].scores, after[name].scores) for name in both}


def _sorted(numbers: Tensor) -> Tensor:
    return numbers.sort(-1).values


def _gap(scores: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """The largest distance, in any row, of a score that one side alone chose from one that the other alone did."""
    mine, theirs = (torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, own, True) for own in (first, second))
    one, other = mine & ~theirs, theirs & ~mine
    inf = float("inf")
    most = [torch.where(own, scores, -inf).amax(-1) for own in (one, other)]
    least = [torch.where(own, scores, inf).amin(-1) for own in (one, other)]
    return torch.maximum(most[0] - least[1], most[1] - least[0]).max()


def _ordered_gap(scores: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """The largest distance of two scores that have the same place in two orders of all of them."""
    return (scores.gather(-1, first) - scores.gather(-1, second)).abs().max()
