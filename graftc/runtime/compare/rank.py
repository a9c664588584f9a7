"""How many directions of a matrix are above the noise of rounding, by a randomised range finder.

Halko, Martinsson, Tropp, "Finding structure with randomness" (arXiv:0909.4061): the matrix times random vectors, twice
more times itself, spans its leading directions. Independent errors of rounding with variances ``s_ij`` have a spectral
norm of about ``max_i sqrt(sum_j s_ij) + max_j sqrt(sum_i s_ij)`` (Bandeira and van Handel, arXiv:1408.6185).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

OVERSAMPLING = 8
"""Directions beyond those that are counted."""
FIRST, LARGEST = 24, 384
"""How many directions are looked for at first, and at last."""
MARGIN = 1.25
"""By how much a direction has to be above the noise to count."""


def estimate_rank(
    times: Callable[[Tensor], Tensor],
    transposed_times: Callable[[Tensor], Tensor],
    changed: tuple[int, int],
    shape: tuple[int, int],
    noise: float,
) -> tuple[int, float] | None:
    """The number of singular values above the noise, and the sum of their squares; None where these are too many, or
    more than half of those that there can be.

    Args:
        times: the matrix times ``[columns, k]``.
        transposed_times: its transpose times ``[rows, k]``.
        changed: rows and columns that are not zero.
        shape: rows and columns.
        noise: spectral norm of what rounding makes.
    """
    most = min(changed)
    wanted = FIRST
    while True:
        count = min(wanted + OVERSAMPLING, *shape)
        values = _leading(times, transposed_times, shape[1], count)
        floor = max(MARGIN * noise, 1e-13 * float(values[0]))
        found = values[values > floor]
        if len(found) > max(1, most // 2) and most > 2:
            return None
        if len(found) <= count - OVERSAMPLING or count == min(shape):
            return len(found), float(found.square().sum())
        if wanted >= LARGEST:
            return None
        wanted *= 4


def _leading(
    times: Callable[[Tensor], Tensor], transposed_times: Callable[[Tensor], Tensor], columns: int, count: int
) -> Tensor:
    """The leading singular values, descending, ``float64[count]``."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(columns, count, generator=generator, dtype=torch.float64)
    basis = torch.linalg.qr(times(start)).Q
    basis = torch.linalg.qr(times(torch.linalg.qr(transposed_times(basis)).Q)).Q
    values: Tensor = torch.linalg.svdvals(transposed_times(basis))
    return values
