"""Products with an input masked by dropout, computed a few rows at a time where that is faster.

Dropped elements are multiplied by zero, so infinite input entries lead to NaN.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

_BLOCK = 2**18
"""Number of input elements masked at a time: few enough to stay in a CPU's cache."""


def _blocks(x: Tensor) -> Iterator[tuple[int, int]]:
    """Return the row ranges in which ``x: [rows, width]`` is processed: several on a CPU, a single one elsewhere."""
    rows, width = x.shape
    size = max(16, _BLOCK // max(1, width)) if x.device.type == "cpu" else max(1, rows)
    return ((start, min(start + size, rows)) for start in range(0, rows, size))


def masked(x: Tensor, mask: Tensor) -> Tensor:
    """Return ``x`` where ``mask``, of the same shape, is true, and zeros elsewhere."""
    return x * mask


def masked_product(x: Tensor, mask: Tensor, other: Tensor) -> Tensor:
    """Return ``masked(x, mask) @ other``; not differentiable.

    Args:
        x: ``[rows, width]``.
        mask: ``bool`` of ``x``'s shape.
        other: ``[width, columns]``.
    """
    result = x.new_empty(x.shape[0], other.shape[1])
    part = None
    for start, end in _blocks(x):
        part = torch.empty_like(x[start:end]) if part is None else part[: end - start]
        torch.mm(part.copy_(_bytes(mask[start:end])).mul_(x[start:end]), other, out=result[start:end])
    return result


def _bytes(mask: Tensor) -> Tensor:
    """View a mask as bytes, which convert to floating point several times as fast."""
    return mask.view(torch.uint8)


def add_masked_product(total: Tensor, mask: Tensor, a: Tensor, b: Tensor) -> None:
    """Add ``masked(a @ b, mask)`` to ``total: [rows, width]``, in place; not differentiable."""
    part = kept = None
    for start, end in _blocks(total):
        part = total.new_empty(end - start, total.shape[1]) if part is None else part[: end - start]
        kept = torch.empty_like(part) if kept is None else kept[: end - start]
        torch.mm(a[start:end], b, out=part)
        total[start:end].addcmul_(part, kept.copy_(_bytes(mask[start:end])))


def product_of_masked(a: Tensor, x: Tensor, mask: Tensor) -> Tensor:
    """Return ``a.t() @ masked(x, mask)`` for ``a: [rows, columns]``; not differentiable."""
    result = x.new_zeros(a.shape[1], x.shape[1])
    part = None
    for start, end in _blocks(x):
        part = torch.empty_like(x[start:end]) if part is None else part[: end - start]
        result.addmm_(a[start:end].t(), part.copy_(_bytes(mask[start:end])).mul_(x[start:end]))
    return result
