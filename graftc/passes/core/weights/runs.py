"""Ascending indices along one axis, as runs: disjoint half-open intervals ``(start, end)``."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, fx

aten = torch.ops.aten
Emit = Callable[..., fx.Node]
"""A function that inserts a call of an operator."""
Index = Callable[[], fx.Node]
"""A function that creates a constant containing the indices in the runs."""
Runs = tuple[tuple[int, int], ...]
MAX_SLICES = 4
"""Up to this number of runs, each is selected by a slice; beyond it, one index tensor selects them all."""


def runs_of(numbers: Tensor) -> Runs:
    """Convert ascending indices without duplicates to runs."""
    if not numbers.numel():
        return ()
    breaks = (torch.nonzero(numbers[1:] - numbers[:-1] != 1).flatten() + 1).tolist()
    values = numbers.tolist()
    return tuple((values[a], values[b - 1] + 1) for a, b in zip([0, *breaks], [*breaks, len(values)], strict=True))


def joined(runs: Iterable[tuple[int, int]]) -> Runs:
    """Merge adjacent runs."""
    merged: list[tuple[int, int]] = []
    for start, end in runs:
        if merged and merged[-1][1] == start:
            merged[-1] = (merged[-1][0], end)
        else:
            merged.append((start, end))
    return tuple(merged)


def meet(a: Runs, b: Runs) -> bool:
    """Return whether the two sets of runs overlap."""
    return any(start < d and c < end for start, end in a for c, d in b)


def contains(a: Runs, b: Runs) -> bool:
    """Return whether all indices of ``b`` are in ``a``, whose runs are not adjacent."""
    return all(any(c <= start and end <= d for c, d in a) for start, end in b)


def places(own: Runs, among: Runs) -> Runs:
    """Return the positions of the indices in ``own`` among the indices in ``among``, which contains them all."""
    positions: list[tuple[int, int]] = []
    for start, end in own:
        at = 0
        for c, d in among:
            if c <= start < d:
                positions.append((at + start - c, at + end - c))
            at += d - c
    return joined(positions)


def window(runs: Runs, start: int, end: int) -> Runs:
    """Return the indices at positions ``start`` to ``end`` (exclusive) in ``runs``."""
    numbers: list[tuple[int, int]] = []
    at = 0
    for a, b in runs:
        first, last = max(a, a + start - at), min(b, a + end - at)
        if first < last:
            numbers.append((first, last))
        at += b - a
    return joined(numbers)


def cut(emit: Emit, node: fx.Node, axis: int, runs: Runs, index: Index) -> fx.Node:
    """Return the node for the part of ``node`` that ``runs`` select along an axis; ``index`` creates the constant."""
    if len(runs) > MAX_SLICES:
        return emit(aten.index_select.default, node, axis, index())
    parts = [emit(aten.slice.Tensor, node, axis, start, end) for start, end in runs]
    return parts[0] if len(parts) == 1 else emit(aten.cat.default, parts, axis)


def put(emit: Emit, node: fx.Node, own: fx.Node, axis: int, runs: Runs, total: int, index: Index) -> fx.Node:
    """Return a node for ``node``, of size ``total`` along the axis, with ``own`` as the part that `cut` selects."""
    if len(runs) > MAX_SLICES:
        return emit(aten.index_copy.default, node, axis, index(), own)
    parts: list[fx.Node] = []
    at = taken = 0
    for start, end in runs:
        if start > at:
            parts.append(emit(aten.slice.Tensor, node, axis, at, start))
        size = end - start
        parts.append(own if len(runs) == 1 else emit(aten.slice.Tensor, own, axis, taken, taken + size))
        at, taken = end, taken + size
    if at < total:
        parts.append(emit(aten.slice.Tensor, node, axis, at, total))
    return emit(aten.cat.default, parts, axis)
