"""Optimisers that know which entries of a tensor a sparse delta contains, and are notified when others replace them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor


@dataclass(frozen=True)
class Seen:
    """Statistics of the gradients of new entries.

    Attributes:
        mean: mean of their gradients, ``f32[k]``.
        square: mean of their squares.
        steps: number of optimiser steps that the means cover.
    """

    mean: Tensor
    square: Tensor
    steps: int


class SparseOptimiser(torch.optim.Optimizer, ABC):
    """Base of the optimisers in `graftc.optim`."""

    factored: ClassVar[bool] = False
    """Whether it has `accumulators` of the deltas that it trains."""

    def holds(self, delta: Tensor) -> bool:
        """Return whether this optimiser trains ``delta``."""
        return any(p is delta for group in self.param_groups for p in group["params"])

    @abstractmethod
    def replaced(self, delta: Tensor, places: Tensor, seen: Seen | None = None) -> None:
        """Forget the state for some places of a delta, which other entries have taken.

        Args:
            delta: the delta, a parameter.
            places: the places, ``int64[n]``.
            seen: what is known of the new entries.
        """

    def accumulators(self, delta: Tensor) -> tuple[Tensor, Tensor] | None:
        """Return bounds of the second moments by row and by column of the tensor that ``delta`` changes.

        These are ``f32[rows]`` and ``f32[columns]``; None if there are none.
        """
        return None
