"""Optimisers that know which entries of a tensor a sparse delta holds, and are told when others take their places."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor


@dataclass(frozen=True)
class Seen:
    """What is known of the gradients of entries that are new.

    Attributes:
        mean: of their gradients, ``f32[k]``.
        square: mean of their squares.
        steps: over how many optimiser steps.
    """

    mean: Tensor
    square: Tensor
    steps: int


class SparseOptimiser(torch.optim.Optimizer, ABC):
    """Base of the optimisers in `graftc.optim`."""

    factored: ClassVar[bool] = False
    """Whether it has `accumulators` of the deltas that it trains."""

    def holds(self, delta: Tensor) -> bool:
        """Whether it is this optimiser that trains ``delta``."""
        return any(p is delta for group in self.param_groups for p in group["params"])

    @abstractmethod
    def replaced(self, delta: Tensor, places: Tensor, seen: Seen | None = None) -> None:
        """Forget what is remembered at some places of a delta, which other entries have taken.

        Args:
            delta: a parameter.
            places: ``int64[n]``.
            seen: what is known of the new entries.
        """

    def accumulators(self, delta: Tensor) -> tuple[Tensor, Tensor] | None:
        """Bounds of the second moments by row and by column of the tensor that ``delta`` changes, ``f32[rows]`` and
        ``f32[columns]``; None where there are none."""
        return None
