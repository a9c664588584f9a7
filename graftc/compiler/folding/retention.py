"""Measure update retention: how much of an update is left after rounding folded tensors to the deployed dtype.

The exact update is ``u = W' - W``, and the applied update is ``v = round(W') - W``. An update much smaller than the
spacing of ``W``'s dtype is lost: most entries of ``v`` are 0, and the others are whole steps, far larger than the
entries of ``u``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from graftc.records.retention import Retention


def retention_of(base: Tensor, exact: Tensor, rounded: Tensor) -> Retention:
    """Return the retention of a tensor, or of part of it, from three tensors with the same shape.

    Two more float64 tensors of that shape are allocated.

    Args:
        base: the tensor before the fold, in any floating-point dtype.
        exact: the folded tensor, in float64.
        rounded: the folded and rounded tensor, in the deployed dtype.
    """
    return retention_of_error(base, exact, rounded.to(torch.float64, copy=True).sub_(exact))


def retention_of_error(base: Tensor, exact: Tensor, error: Tensor, spare: Tensor | None = None) -> Retention:
    """Return the same result as `retention_of`, given ``rounded - exact`` in float64.

    ``error`` is overwritten, and so is ``spare``, a buffer with the same dtype and shape. If rounding restores the
    base's value, ``error`` is bitwise equal to ``-u``, so that the entry counts as unchanged.
    """
    back = torch.empty_like(error) if spare is None else spare
    back = back.copy_(base).sub_(exact).add_(0.0).reshape(-1)  # -u, without a -0.0
    error = error.reshape(-1)
    update, shared, lost = (float(torch.dot(a, b)) for a, b in ((back, back), (back, error), (error, error)))
    wanted = _not_zero(back)
    return Retention(update, update - shared, lost, wanted, _not_zero(error.sub_(back)))


def _not_zero(values: Tensor) -> int:
    """Return how many values of a contiguous float64 tensor are not 0.

    No value may be -0.0: values are counted as integers, which is faster.
    """
    return int(torch.count_nonzero(values.view(torch.int64)))
