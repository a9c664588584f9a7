"""Estimate how many directions of a matrix are above the rounding noise, using a randomised range finder.

Halko, Martinsson, Tropp, "Finding structure with randomness" (arXiv:0909.4061): the product of the matrix with random
vectors, multiplied by the matrix two more times, spans its leading directions. Independent rounding errors with
variances ``s_ij`` have a spectral norm of about ``max_i sqrt(sum_j s_ij) + max_j sqrt(sum_i s_ij)`` (Bandeira and van
Handel, arXiv:1408.6185).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

OVERSAMPLING = 8
"""The number of extra directions, which are not counted."""
FIRST, LARGEST = 24, 384
"""The numbers of directions in the first and in the largest search."""
MARGIN = 1.25
"""The factor by which a direction must exceed the noise to be counted."""


def estimate_rank(
    times: Callable[[Tensor], Tensor],
    transposed_times: Callable[[Tensor], Tensor],
    changed: tuple[int, int],
    shape: tuple[int, int],
    noise: float,
) -> tuple[int, float] | None:
    """Return the number of singular values above the noise, and the sum of their squares.

    The result is None if there are too many of these values, or more than half of the largest possible number.

    Args:
        times: a function that multiplies the matrix by another, ``[columns, k]``.
        transposed_times: a function that multiplies the matrix's transpose by another matrix, ``[rows, k]``.
        changed: the numbers of rows and columns that are not zero.
        shape: the numbers of rows and columns.
        noise: the spectral norm of the rounding errors.
    """
    most = min(changed)
    wanted = FIRST
    while True:
        count = min(wanted + OVERSAMPLING, *shape)
        values = _leading(times, transposed_times, shape[1], count)
        floor = max(MARGIN * noise, 1e-13 * float(values[0]))
        significant = values[values > floor]
        if len(significant) > max(1, most // 2) and most > 2:
            return None
        if len(significant) <= count - OVERSAMPLING or count == min(shape):
            return len(significant), float(significant.square().sum())
        if wanted >= LARGEST:
            return None
        wanted *= 4


def _leading(
    times: Callable[[Tensor], Tensor], transposed_times: Callable[[Tensor], Tensor], columns: int, count: int
) -> Tensor:
    """Return the leading singular values in descending order, ``float64[count]``."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(columns, count, generator=generator, dtype=torch.float64)
    basis = torch.linalg.qr(times(start)).Q
    basis = torch.linalg.qr(times(torch.linalg.qr(transposed_times(basis)).Q)).Q
    values: Tensor = torch.linalg.svdvals(transposed_times(basis))
    return values
