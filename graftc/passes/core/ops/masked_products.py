"""Products with what dropout leaves of an input, which is made a few rows at a time where that is faster.

What is dropped is multiplied by zero: where an input has infinite entries, products have entries that are not numbers.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

_BLOCK = 2**18
"""How many elements of an input are made at a time: they stay in the cache of a CPU."""


def _blocks(x: Tensor) -> Iterator[tuple[int, int]]:
    """Rows of ``x: [rows, width]``; all at once on devices that compute best so."""
    rows, width = x.shape
    size = max(16, _BLOCK // max(1, width)) if x.device.type == "cpu" else max(1, rows)
    return ((start, min(start + size, rows)) for start in range(0, rows, size))


def masked(x: Tensor, mask: Tensor) -> Tensor:
    """``x`` where ``mask``, of its shape, is true, and zeros."""
    return x * mask


def masked_product(x: Tensor, mask: Tensor, other: Tensor) -> Tensor:
    """``masked(x, mask) @ other``; nothing looks at its gradient.

    Args:
        x: ``[rows, width]``.
        mask: ``bool`` of ``x``'s shape.
        other: ``[width, columns]``.
    """
    found = x.new_empty(x.shape[0], other.shape[1])
    part = None
    for start, end in _blocks(x):
        part = torch.empty_like(x[start:end]) if part is None else part[: end - start]
        torch.mm(part.copy_(_bytes(mask[start:end])).mul_(x[start:end]), other, out=found[start:end])
    return found


def _bytes(mask: Tensor) -> Tensor:
    """The same memory as numbers, which are made floating point several times as fast."""
    return mask.view(torch.uint8)


def add_masked_product(total: Tensor, mask: Tensor, a: Tensor, b: Tensor) -> None:
    """Add ``masked(a @ b, mask)`` to ``total: [rows, width]``, in place; nothing looks at its gradient."""
    part = kept = None
    for start, end in _blocks(total):
        part = total.new_empty(end - start, total.shape[1]) if part is None else part[: end - start]
        kept = torch.empty_like(part) if kept is None else kept[: end - start]
        torch.mm(a[start:end], b, out=part)
        total[start:end].addcmul_(part, kept.copy_(_bytes(mask[start:end])))


def product_of_masked(a: Tensor, x: Tensor, mask: Tensor) -> Tensor:
    """``a.t() @ masked(x, mask)`` for ``a: [rows, columns]``; nothing looks at its gradient."""
    found = x.new_zeros(a.shape[1], x.shape[1])
    part = None
    for start, end in _blocks(x):
        part = torch.empty_like(x[start:end]) if part is None else part[: end - start]
        found.addmm_(a[start:end].t(), part.copy_(_bytes(mask[start:end])).mul_(x[start:end]))
    return found
