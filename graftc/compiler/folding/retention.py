"""Update retention: how much of an update is left once folded tensors have been rounded to the type that is deployed.

With the exact update ``u = W' - W`` and what was applied, ``v = round(W') - W``, an update that is much smaller than
the spacing of ``W``'s type is lost: most entries of ``v`` are 0, and the others are a whole step too large.
"""

from __future__ import annotations

import torch
from torch import Tensor

from graftc.records.certificate import Retention


def retention_of(base: Tensor, exact: Tensor, rounded: Tensor) -> Retention:
    """Return the retention of one tensor or of a part of it, from three tensors of one shape.

    Two more tensors of that shape are allocated in float64.

    Args:
        base: the tensor before the fold, in any floating-point type.
        exact: the folded tensor, in float64.
        rounded: the folded and rounded tensor, in the type that is deployed.
    """
    return retention_of_error(base, exact, rounded.to(torch.float64, copy=True).sub_(exact))


def retention_of_error(base: Tensor, exact: Tensor, error: Tensor, spare: Tensor | None = None) -> Retention:
    """Return the same as `retention_of`, given ``rounded - exact`` in float64.

    ``error`` is overwritten, and so is ``spare``, a buffer of the same type and sizes. If rounding restores the base's
    value, ``error`` is ``-u`` to the bit, so that the entry counts as unchanged.
    """
    back = torch.empty_like(error) if spare is None else spare
    back = back.copy_(base).sub_(exact).add_(0.0).reshape(-1)  # -u, without a -0.0
    error = error.reshape(-1)
    update, shared, lost = (float(torch.dot(a, b)) for a, b in ((back, back), (back, error), (error, error)))
    wanted = _not_zero(back)
    return Retention(update, update - shared, lost, wanted, _not_zero(error.sub_(back)))


def _not_zero(values: Tensor) -> int:
    """Return how many of contiguous float64 numbers are not 0.

    None of them may be -0.0: they are counted as integers, which is faster.
    """
    return int(torch.count_nonzero(values.view(torch.int64)))
