"""Update retention: how much of an update is left once folded tensors have been rounded to the type that is deployed.

With the exact update ``u = W' - W`` and what was applied, ``v = round(W') - W``, an update that is much smaller than
the spacing of ``W``'s type is lost: most entries of ``v`` are 0, and the others are a whole step too large.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Retention:
    """What rounding left of an update. Sums over entries, so that parts of tensors, and sites, add up.

    Attributes:
        exact: ``<u, u>``.
        applied: ``<u, v>``.
        lost: ``|v - u|^2``.
        wanted: how many entries the update changes: ``u != 0``.
        changed: in how many of these rounding left a change: ``v != 0``.
    """

    exact: float = 0.0
    applied: float = 0.0
    lost: float = 0.0
    wanted: int = 0
    changed: int = 0

    @classmethod
    def of(cls, base: Tensor, exact: Tensor, rounded: Tensor) -> Retention:
        """Of one tensor, or of a part of it: three tensors of one shape, two more of which are made in float64.

        Args:
            base: the tensor as it was, in any floating type.
            exact: folded, float64.
            rounded: folded and rounded, in the type that is deployed.
        """
        return cls.of_error(base, exact, rounded.to(torch.float64, copy=True).sub_(exact))

    @classmethod
    def of_error(cls, base: Tensor, exact: Tensor, error: Tensor, spare: Tensor | None = None) -> Retention:
        """The same where ``rounded - exact`` is known, in float64; it is changed, and so is ``spare``, room of the same
        type and sizes.

        Where rounding gives back the base's value, ``error`` is ``-u`` to the bit, so that no change counts as lost.
        """
        back = torch.empty_like(error) if spare is None else spare
        back = back.copy_(base).sub_(exact).add_(0.0).reshape(-1)  # -u, without a -0.0
        error = error.reshape(-1)
        update, shared, lost = (float(torch.dot(a, b)) for a, b in ((back, back), (back, error), (error, error)))
        wanted = _not_zero(back)
        return cls(update, update - shared, lost, wanted, _not_zero(error.sub_(back)))

    def __add__(self, other: Retention) -> Retention:
        return Retention(
            self.exact + other.exact,
            self.applied + other.applied,
            self.lost + other.lost,
            self.wanted + other.wanted,
            self.changed + other.changed,
        )

    @classmethod
    def total(cls, found: Iterable[Retention]) -> Retention:
        """Of several tensors."""
        return sum(found, cls())

    @property
    def norm(self) -> float:
        """``<u, v> / <u, u>``: how much of the update is there, 1 where all of it; 1 where there was none."""
        return self.applied / self.exact if self.exact else 1.0

    @property
    def error(self) -> float:
        """``|v - u| / |u|``: how far from the update what was applied is; 0 where there was none."""
        return math.sqrt(self.lost / self.exact) if self.exact else 0.0

    @property
    def entries(self) -> float:
        """Share of the entries that the update changes in which a change is left; 1 where it changes none."""
        return self.changed / self.wanted if self.wanted else 1.0

    @property
    def unchanged(self) -> bool:
        """Whether no entry differs from the base's."""
        return not self.changed

    def to_json(self) -> dict[str, float] | None:
        """The three numbers; None where there was no update to retain."""
        return {"norm": self.norm, "error": self.error, "entries": self.entries} if self.wanted else None


def _not_zero(values: Tensor) -> int:
    """How many of contiguous float64 numbers are not 0, none of which is -0.0: whole numbers are counted faster."""
    return int(torch.count_nonzero(values.view(torch.int64)))
