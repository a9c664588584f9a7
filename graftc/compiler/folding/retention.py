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
    """The part of an update that rounding left, as sums over entries, so that parts of tensors and sites add up.

    Attributes:
        exact: ``<u, u>``.
        applied: ``<u, v>``.
        lost: ``|v - u|^2``.
        wanted: the number of entries that the update changes: ``u != 0``.
        changed: the number of these in which rounding left a change: ``v != 0``.
    """

    exact: float = 0.0
    applied: float = 0.0
    lost: float = 0.0
    wanted: int = 0
    changed: int = 0

    @classmethod
    def of(cls, base: Tensor, exact: Tensor, rounded: Tensor) -> Retention:
        """Return the retention of one tensor or of a part of it, from three tensors of one shape.

        Two more tensors of that shape are allocated in float64.

        Args:
            base: the tensor before the fold, in any floating-point type.
            exact: the folded tensor, in float64.
            rounded: the folded and rounded tensor, in the type that is deployed.
        """
        return cls.of_error(base, exact, rounded.to(torch.float64, copy=True).sub_(exact))

    @classmethod
    def of_error(cls, base: Tensor, exact: Tensor, error: Tensor, spare: Tensor | None = None) -> Retention:
        """Return the same as `of`, given ``rounded - exact`` in float64.

        ``error`` is overwritten, and so is ``spare``, a buffer of the same type and sizes. If rounding restores the
        base's value, ``error`` is ``-u`` to the bit, so that the entry counts as unchanged.
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
    def total(cls, retentions: Iterable[Retention]) -> Retention:
        """Return the retention of several tensors together."""
        return sum(retentions, cls())

    @property
    def norm(self) -> float:
        """``<u, v> / <u, u>``: the share of the update that is left, 1 if all of it is; 1 if there was none."""
        return self.applied / self.exact if self.exact else 1.0

    @property
    def error(self) -> float:
        """``|v - u| / |u|``: the relative distance of what was applied from the update; 0 if there was none."""
        return math.sqrt(self.lost / self.exact) if self.exact else 0.0

    @property
    def entries(self) -> float:
        """The share of the entries changed by the update in which a change is left; 1 if it changes none."""
        return self.changed / self.wanted if self.wanted else 1.0

    @property
    def unchanged(self) -> bool:
        """Whether no entry differs from the base's."""
        return not self.changed

    def to_json(self) -> dict[str, float] | None:
        """Return the three numbers; None if there was no update to retain."""
        return {"norm": self.norm, "error": self.error, "entries": self.entries} if self.wanted else None


def _not_zero(values: Tensor) -> int:
    """Return how many of contiguous float64 numbers are not 0.

    None of them may be -0.0: they are counted as integers, which is faster.
    """
    return int(torch.count_nonzero(values.view(torch.int64)))
