"""Helpers for tensors of column indices: ``source << 32 | column``, or `HOLE` for an unknown column."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

SHIFT = 32
_COLUMN = (1 << SHIFT) - 1


def varying(index: Tensor) -> tuple[int, ...]:
    """Return the axes along which columns differ."""
    axes = []
    for axis, (size, stride) in enumerate(zip(index.shape, index.stride(), strict=True)):
        if size > 1 and stride and not torch.equal(index.narrow(axis, 1, size - 1), index.narrow(axis, 0, size - 1)):
            axes.append(axis)
    return tuple(axes)


def distinct(index: Tensor) -> dict[int, Tensor]:
    """Return the distinct columns of each source, sorted; repeated rows are views with stride 0 and cost nothing."""
    if index.is_complex():
        index = torch.view_as_real(index.resolve_conj()).round().long()
    for dim, stride in enumerate(index.stride()):
        if stride == 0 and index.shape[dim]:
            index = index.narrow(dim, 0, 1)
    flat = index.reshape(-1)
    if flat.numel() and (low := int(flat[0])) >= 0:
        high = low + flat.numel() - 1
        if low >> SHIFT == high >> SHIFT and torch.equal(flat, torch.arange(low, high + 1)):  # the usual case
            return {low >> SHIFT: flat & _COLUMN}
    flat = flat[flat >= 0]
    if not flat.numel():
        return {}
    numbers = flat >> SHIFT
    low, high = int(numbers.min()), int(numbers.max())
    sources = [low] if low == high else torch.unique(numbers).tolist()
    by_source: dict[int, Tensor] = {}
    for number in sources:
        columns = (flat if low == high else flat[numbers == number]) & _COLUMN
        present = torch.zeros(int(columns.max()) + 1, dtype=torch.bool)
        present[columns] = True
        by_source[number] = torch.nonzero(present).flatten()
    return by_source


def renumbered(index: Tensor, numbers: Sequence[int]) -> Tensor:
    """Return the indices with their source numbers, which count from 0, replaced by ``numbers``."""
    if index.is_complex():
        return torch.view_as_complex(
            renumbered(torch.view_as_real(index.resolve_conj()).round().long(), numbers).double()
        )
    sources = torch.tensor(numbers, dtype=torch.int64)[(index >> SHIFT).clamp(min=0)]
    return torch.where(index < 0, index, sources << SHIFT | index & _COLUMN)
