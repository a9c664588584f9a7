"""Rows: which output rows of a fused weight belong to a site, in tensors and in graphs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, fx

aten = torch.ops.aten
Emit = Callable[..., fx.Node]
MAX_SLICES = 4
"""Up to this many runs are cut with slices; beyond, one index selects them."""


def runs_of(numbers: Tensor) -> tuple[tuple[int, int], ...]:
    """Sorted numbers as half-open runs."""
    if not numbers.numel():
        return ()
    breaks = (torch.nonzero(numbers[1:] - numbers[:-1] != 1).flatten() + 1).tolist()
    values = numbers.tolist()
    return tuple((values[a], values[b - 1] + 1) for a, b in zip([0, *breaks], [*breaks, len(values)], strict=True))


@dataclass(frozen=True)
class Rows:
    """Output rows of a ``[total, in]`` weight: everything, or sorted disjoint half-open runs.

    Attributes:
        total: rows of the whole weight.
        runs: the own rows; None is all of them.
    """

    total: int
    runs: tuple[tuple[int, int], ...] | None = None

    def __post_init__(self) -> None:
        if self.runs == ((0, self.total),):
            object.__setattr__(self, "runs", None)

    @property
    def whole(self) -> bool:
        """Whether these are all rows."""
        return self.runs is None

    @property
    def spans(self) -> tuple[tuple[int, int], ...]:
        """The runs, spelled out when these are all rows."""
        return ((0, self.total),) if self.runs is None else self.runs

    @property
    def count(self) -> int:
        """How many rows."""
        return sum(end - start for start, end in self.spans)

    def overlaps(self, other: Rows) -> bool:
        """Whether any row is in both."""
        return any(a < d and c < b for a, b in self.spans for c, d in other.spans)

    def __str__(self) -> str:
        return "all" if self.whole else ",".join(f"{a}:{b}" for a, b in self.spans)

    def index(self, device: torch.device | None = None) -> Tensor:
        """Row numbers, ``int64[count]``."""
        return torch.cat([torch.arange(a, b, device=device) for a, b in self.spans])

    def covers(self, other: Rows) -> bool:
        """Whether all rows of ``other`` are among these."""
        return all(any(c <= a and b <= d for c, d in self.spans) for a, b in other.spans)

    def within(self, other: Rows) -> Rows:
        """Where these rows lie among the rows of ``other``, which covers them: rows of a ``[other.count, in]``."""
        runs: list[tuple[int, int]] = []
        for a, b in self.spans:
            at = 0
            for c, d in other.spans:
                if c <= a < d:
                    runs.append((at + a - c, at + b - c))
                at += d - c
        joined: list[tuple[int, int]] = []
        for run in runs:
            if joined and joined[-1][1] == run[0]:
                joined[-1] = (joined[-1][0], run[1])
            else:
                joined.append(run)
        return Rows(other.count, tuple(joined))

    def take(self, tensor: Tensor, dim: int = 0) -> Tensor:
        """The own rows of a tensor that has ``total`` along ``dim``."""
        return tensor if self.whole else tensor.index_select(dim, self.index(tensor.device))

    def put(self, tensor: Tensor, rows: Tensor, dim: int = 0) -> Tensor:
        """A copy of a tensor that has ``total`` along ``dim``, with the own rows replaced."""
        return rows if self.whole else tensor.index_copy(dim, self.index(tensor.device), rows)

    def read(self, emit: Emit, node: fx.Node, dim: int, index: Callable[[], fx.Node]) -> fx.Node:
        """The node for the own part of ``node`` along ``dim``; ``index`` makes the row numbers a constant."""
        if self.whole:
            return node
        if len(self.spans) > MAX_SLICES:
            return emit(aten.index_select.default, node, dim, index())
        parts = [emit(aten.slice.Tensor, node, dim, a, b) for a, b in self.spans]
        return parts[0] if len(parts) == 1 else emit(aten.cat.default, parts, dim)

    def write(self, emit: Emit, node: fx.Node, own: fx.Node, dim: int, index: Callable[[], fx.Node]) -> fx.Node:
        """The node for ``node`` with the own part along ``dim`` replaced by ``own``."""
        if self.whole:
            return own
        if len(self.spans) > MAX_SLICES:
            return emit(aten.index_copy.default, node, dim, index(), own)
        parts: list[fx.Node] = []
        at = taken = 0
        for start, end in self.spans:
            if start > at:
                parts.append(emit(aten.slice.Tensor, node, dim, at, start))
            size = end - start
            single = len(self.spans) == 1
            parts.append(own if single else emit(aten.slice.Tensor, own, dim, taken, taken + size))
            at, taken = end, taken + size
        if at < self.total:
            parts.append(emit(aten.slice.Tensor, node, dim, at, self.total))
        return emit(aten.cat.default, parts, dim)
