"""Measure update retention: how much of an update is left after rounding folded tensors to the deployed dtype.

The exact update is ``u = W' - W``, and the applied update is ``v = round(W') - W``. An update much smaller than the
spacing of ``W``'s dtype is lost: most entries of ``v`` are 0, and the others are whole steps, far larger than the
entries of ``u``.

An update that is nowhere larger than what rounding can do is none: an untrained DoRA multiplies each row by the row's
norm, which is stored in the adapter's type, over the exact one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from graftc.records.retention import Retention

_NOISE = 8
"""How many units in the last place rounding explains in float32 and float64: a norm that is summed in such a type over
the columns of a large layer is off by up to six. Norms of 16-bit weights are summed in float32 and rounded once."""


def retention_of(base: Tensor, exact: Tensor, rounded: Tensor) -> Retention:
    """Return the retention of a tensor, or of part of it, from three tensors with the same shape.

    Two more float64 tensors of that shape are allocated.

    Args:
        base: the tensor before the fold, in any floating-point dtype.
        exact: the folded tensor, in float64.
        rounded: the folded and rounded tensor, in the deployed dtype.
    """
    return retention_of_error(base, exact, rounded.to(torch.float64, copy=True).sub_(exact), rounded.dtype)


def retention_of_error(
    base: Tensor, exact: Tensor, error: Tensor, dtype: torch.dtype, spare: Tensor | None = None, *, look: bool = True
) -> Retention:
    """Return the same result as `retention_of`, given ``rounded - exact`` in float64.

    ``error`` is overwritten, and so is ``spare``, a buffer with the same dtype and shape. If rounding restores the
    base's value, ``error`` is bitwise equal to ``-u``, so that the entry counts as unchanged. Whether the update is
    larger than rounding in ``dtype`` is only computed if ``look`` is true.
    """
    back = torch.empty_like(error) if spare is None else spare
    back.copy_(base).sub_(exact).add_(0.0)  # -u, without a -0.0
    shape, back, error = error.shape, back.reshape(-1), error.reshape(-1)
    update, shared, lost = (float(torch.dot(a, b)) for a, b in ((back, back), (back, error), (error, error)))
    wanted = _not_zero(back)
    changed = _not_zero(error.sub_(back))
    beyond = changed and look and bool((back.abs_() > _rounding(base, dtype, error.view(shape)).reshape(-1)).any())
    return Retention(update, update - shared, lost, wanted, changed, int(beyond))


def _rounding(base: Tensor, dtype: torch.dtype, out: Tensor) -> Tensor:
    """Return how far rounding can move each value of a tensor, in float64; ``out`` is overwritten."""
    info = torch.finfo(dtype)
    units = 1 if info.bits <= 16 else _NOISE
    return power_below(out.copy_(base), dtype, out).mul_(units * info.eps)


def power_below(values: Tensor, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """Return the largest power of two at or below each absolute value, which determines its unit in the last place.

    The result is at least the smallest normal number of ``dtype``, below which units stay the same.

    Args:
        values: the values, in float64.
        dtype: a floating-point dtype.
        out: the tensor to write to, with the shape and dtype of ``values``; by default a new tensor.
    """
    power = torch.empty_like(values) if out is None else out
    # A float64 with only its exponent bits left is that power.
    torch.bitwise_and(values.view(torch.int64), 0x7FF0000000000000, out=power.view(torch.int64))
    return power.clamp_min_(torch.finfo(dtype).tiny)


def _not_zero(values: Tensor) -> int:
    """Return how many values of a contiguous float64 tensor are not 0.

    No value may be -0.0: values are counted as integers, which is faster.
    """
    return int(torch.count_nonzero(values.view(torch.int64)))
