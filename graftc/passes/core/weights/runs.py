"""Runs: ascending numbers along one axis, as disjoint half-open runs ``(start, end)``."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, fx

aten = torch.ops.aten
Emit = Callable[..., fx.Node]
"""Inserts a call of an operator."""
Index = Callable[[], fx.Node]
"""Makes a constant of numbers."""
Runs = tuple[tuple[int, int], ...]
MAX_SLICES = 4
"""Up to this many runs are cut with slices; beyond, one index selects them."""


def runs_of(numbers: Tensor) -> Runs:
    """Ascending numbers, each once, as runs."""
    if not numbers.numel():
        return ()
    breaks = (torch.nonzero(numbers[1:] - numbers[:-1] != 1).flatten() + 1).tolist()
    values = numbers.tolist()
    return tuple((values[a], values[b - 1] + 1) for a, b in zip([0, *breaks], [*breaks, len(values)], strict=True))


def joined(runs: Iterable[tuple[int, int]]) -> Runs:
    """Runs with those that touch made one."""
    found: list[tuple[int, int]] = []
    for start, end in runs:
        if found and found[-1][1] == start:
            found[-1] = (found[-1][0], end)
        else:
            found.append((start, end))
    return tuple(found)


def meet(a: Runs, b: Runs) -> bool:
    """Whether any number is in both."""
    return any(start < d and c < end for start, end in a for c, d in b)


def contains(a: Runs, b: Runs) -> bool:
    """Whether all numbers of ``b`` are in ``a``, whose runs do not touch."""
    return all(any(c <= start and end <= d for c, d in a) for start, end in b)


def places(own: Runs, among: Runs) -> Runs:
    """Where numbers are in the list of those of ``among``, which contains them."""
    found: list[tuple[int, int]] = []
    for start, end in own:
        at = 0
        for c, d in among:
            if c <= start < d:
                found.append((at + start - c, at + end - c))
            at += d - c
    return joined(found)


def window(runs: Runs, start: int, end: int) -> Runs:
    """The numbers from the ``start``-th to before the ``end``-th of those in runs."""
    found: list[tuple[int, int]] = []
    at = 0
    for a, b in runs:
        first, last = max(a, a + start - at), min(b, a + end - at)
        if first < last:
            found.append((first, last))
        at += b - a
    return joined(found)


def cut(emit: Emit, node: fx.Node, axis: int, runs: Runs, index: Index) -> fx.Node:
    """The node for the part of ``node`` that runs along an axis are; ``index`` makes their numbers a constant."""
    if len(runs) > MAX_SLICES:
        return emit(aten.index_select.default, node, axis, index())
    parts = [emit(aten.slice.Tensor, node, axis, start, end) for start, end in runs]
    return parts[0] if len(parts) == 1 else emit(aten.cat.default, parts, axis)


def put(emit: Emit, node: fx.Node, own: fx.Node, axis: int, runs: Runs, total: int, index: Index) -> fx.Node:
    """The node for ``node``, which has ``total`` along an axis, with ``own`` in the place of what `cut` gives."""
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
