"""Scores of tensor entries, computed from examples, for methods that choose entries by score."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor


class Scoring(ABC):
    """Accumulates the scores of entries, one backward pass at a time."""

    single = False
    """Whether every example in a batch has its own backward pass."""

    @abstractmethod
    def add(self, scores: Tensor, tensor: Tensor, gradient: Tensor) -> None:
        """Add the scores from one backward pass to a tensor's scores.

        Args:
            scores: the scores so far, float32 or wider, changed in place.
            tensor: the tensor's values.
            gradient: the gradient of the loss; it may be changed.
        """


@dataclass(frozen=True)
class Fisher(Scoring):
    """The diagonal of the empirical Fisher information: squared gradients.

    Attributes:
        single: whether gradients are computed for single examples. With whole batches, the score is the square of a
            mean, which is smaller.
        clip: maximum norm of a tensor's gradient; a larger gradient is scaled down to it. None for no limit.
    """

    single: bool = True
    clip: float | None = None

    def add(self, scores: Tensor, tensor: Tensor, gradient: Tensor) -> None:
        """Add the squares of the gradient, which is first clipped to the norm `clip`."""
        gradient = gradient.to(scores.dtype)
        if self.clip is not None:
            norm = torch.linalg.vector_norm(gradient)
            gradient = gradient * (self.clip / (norm + 1e-6)).clamp_max(1)
        scores.addcmul_(gradient, gradient)


class Movement(Scoring):
    """``-W dL/dW``: positive where a gradient descent step moves an entry away from zero (Sanh et al. 2020)."""

    def add(self, scores: Tensor, tensor: Tensor, gradient: Tensor) -> None:
        """Add ``-W dL/dW``."""
        scores.addcmul_(tensor.to(scores.dtype), gradient.to(scores.dtype), value=-1)


class GradientSum(Scoring):
    """The sum of the gradients of all batches."""

    def add(self, scores: Tensor, tensor: Tensor, gradient: Tensor) -> None:
        """Add the gradient."""
        scores.add_(gradient.to(scores.dtype))
