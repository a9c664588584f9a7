"""The base class of optimisers for sparse deltas, which are notified when a delta's entries are replaced."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor


@dataclass(frozen=True)
class Seen:
    """Gradient statistics of new entries.

    Attributes:
        mean: the mean gradient of each entry, ``f32[k]``.
        square: the mean squared gradient of each entry.
        steps: the number of optimiser steps over which the means were taken.
    """

    mean: Tensor
    square: Tensor
    steps: int


class SparseOptimiser(torch.optim.Optimizer, ABC):
    """Base class of the optimisers in `graftc.optim`."""

    factored: ClassVar[bool] = False
    """Whether the optimiser has `accumulators` for the deltas that it trains."""

    def holds(self, delta: Tensor) -> bool:
        """Return whether this optimiser trains ``delta``."""
        return any(p is delta for group in self.param_groups for p in group["params"])

    @abstractmethod
    def replaced(self, delta: Tensor, places: Tensor, seen: Seen | None = None) -> None:
        """Discard the state for some positions of a delta, which now hold other entries.

        Args:
            delta: the delta, a parameter.
            places: the positions, ``int64[n]``.
            seen: gradient statistics of the new entries, if known.
        """

    def accumulators(self, delta: Tensor) -> tuple[Tensor, Tensor] | None:
        """Return bounds on the second moments of the tensor that ``delta`` changes, for each row and for each column.

        These are ``f32[rows]`` and ``f32[columns]``; None if the optimiser has none.
        """
        return None
