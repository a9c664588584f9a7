"""Principal components of vectors that arrive in batches."""

from __future__ import annotations

import torch
from torch import Tensor

_KEPT_FACTOR = 4
"""The number of directions that are kept between batches for each that is wanted."""


class PrincipalComponents:
    """The directions of greatest variance of vectors, updated batch by batch (Ross et al. 2008).

    Between batches only the first ``4 * count`` directions are kept, so the result is exact if no batch has variance
    outside of them, and an approximation otherwise.

    Args:
        count: the number of directions.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self.seen = 0
        self._mean: Tensor | None = None
        self._squares: Tensor | None = None
        self._scaled: Tensor | None = None

    @torch.no_grad()
    def add(self, vectors: Tensor) -> None:
        """Add ``vectors: [n, width]``, which are used in float32 or wider."""
        if not vectors.shape[0]:
            return
        vectors = vectors.to(torch.promote_types(vectors.dtype, torch.float32))
        count, mean = vectors.shape[0], vectors.mean(0)
        centred = vectors - mean
        squares = centred.square().sum()
        rows = [centred]
        if self._mean is not None and self._scaled is not None and self._squares is not None:
            shift = (self.seen * count / (self.seen + count)) ** 0.5 * (self._mean - mean)
            rows = [self._scaled, centred, shift[None]]
            squares = squares + self._squares + shift.square().sum()
            mean = self._mean + (mean - self._mean) * (count / (self.seen + count))
        _, values, directions = torch.linalg.svd(torch.cat(rows), full_matrices=False)
        limit = _KEPT_FACTOR * self.count
        self._scaled = values[:limit, None] * directions[:limit]
        self._mean, self._squares, self.seen = mean, squares, self.seen + count

    @property
    def directions(self) -> Tensor:
        """The directions, orthonormal rows in descending order of variance, ``[at most count, width]``."""
        assert self._scaled is not None
        return torch.nn.functional.normalize(self._scaled[: self.count], dim=-1)

    @property
    def variances(self) -> Tensor:
        """The variance in each direction, ``[at most count]``."""
        assert self._scaled is not None
        return self._scaled[: self.count].square().sum(-1) / max(1, self.seen - 1)

    @property
    def explained(self) -> Tensor:
        """The share of the whole variance in each direction, ``[at most count]``."""
        assert self._scaled is not None and self._squares is not None
        return self._scaled[: self.count].square().sum(-1) / self._squares.clamp_min(
            torch.finfo(self._squares.dtype).tiny
        )
