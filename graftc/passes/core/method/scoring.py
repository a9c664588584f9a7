"""Scores that examples give to every entry of a tensor, for methods that choose entries by them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor


class Scoring(ABC):
    """Adds up scores of entries, one backward pass at a time."""

    single = False
    """Whether every example of a batch has a backward pass of its own."""

    @abstractmethod
    def add(self, scores: Tensor, tensor: Tensor, gradient: Tensor) -> None:
        """Add the scores of one backward pass to the scores of a tensor.

        Args:
            scores: the scores so far, float32 or wider, changed in place.
            tensor: the values of the tensor.
            gradient: the gradient of the loss; it may be changed.
        """


@dataclass(frozen=True)
class Fisher(Scoring):
    """The diagonal of the empirical Fisher information: squares of gradients.

    Attributes:
        single: whether the gradients are those of single examples. With whole batches, the score is the square of a
            mean, which is smaller.
        clip: largest norm of a tensor's gradient, which is first scaled down to it; None for no limit.
    """

    single: bool = True
    clip: float | None = None

    def add(self, scores: Tensor, tensor: Tensor, gradient: Tensor) -> None:
        """Add the squares of the gradient, which is first scaled down to `clip`."""
        gradient = gradient.to(scores.dtype)
        if self.clip is not None:
            norm = torch.linalg.vector_norm(gradient)
            gradient = gradient * (self.clip / (norm + 1e-6)).clamp_max(1)
        scores.addcmul_(gradient, gradient)


class Movement(Scoring):
    """``-W dL/dW``: positive where a step of descent moves an entry away from zero (Sanh et al. 2020)."""

    def add(self, scores: Tensor, tensor: Tensor, gradient: Tensor) -> None:
        """Add ``-W dL/dW``."""
        scores.addcmul_(tensor.to(scores.dtype), gradient.to(scores.dtype), value=-1)
