"""Measure how a tensor differs (magnitude, rows and columns, rank and cause), in passes over blocks of rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from graftc.compiler.folding.retention import power_below
from graftc.compiler.folding.rounding import largest
from graftc.records.comparison import Cause, Difference
from graftc.runtime.compare.rank import estimate_rank

Read = Callable[[int, int], Tensor]
"""A function that returns the rows ``[start, end)`` of a stored matrix, as they are stored."""
BLOCK = 2**20
"""The maximum number of elements in a block."""


@dataclass
class _Sums:
    """The results of one pass over two matrices, in float64.

    Attributes:
        largest, update, base: the largest difference, and the squared norms of the difference and of the base.
        changed: the number of elements that differ.
        rows, columns: for each row and column, whether it differs anywhere.
        row_noise, column_noise: the variance caused by rounding in each row and column.
        row_products, column_products: ``<base, other>`` and ``|base|^2`` for each row and column.
    """

    largest: float
    update: float
    base: float
    changed: int
    rows: Tensor
    columns: Tensor
    row_noise: Tensor
    column_noise: Tensor
    row_products: tuple[Tensor, Tensor]
    column_products: tuple[Tensor, Tensor]


class Matrices:
    """Two checkpoints' versions of a matrix; a vector is a single row.

    Args:
        a, b: functions that read rows of the first and of the second matrix.
        shape: the numbers of rows and columns.
    """

    def __init__(self, a: Read, b: Read, shape: tuple[int, int]) -> None:
        self._a, self._b, self.shape = a, b, shape

    def blocks(self) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Yield the index of each block's first row, and the block's rows on both sides as they are stored."""
        rows, columns = self.shape
        step = max(1, BLOCK // max(columns, 1))
        for start in range(0, rows, step):
            end = min(rows, start + step)
            yield start, self._a(start, end), self._b(start, end)

    def equal(self) -> bool:
        """Return whether all values are equal, with NaN in the same places; dtypes may differ."""
        for _, a, b in self.blocks():
            if a.dtype != b.dtype:
                a, b = a.double(), b.double()
            same = a.eq(b)
            if not bool(same.all()) and not bool((same | (a.isnan() & b.isnan())).all()):
                return False
        return True

    def times(self, right: Tensor) -> Tensor:
        """Return the product of the difference and a matrix ``[columns, k]``, in float64."""
        return torch.cat([(b.double() - a.double()) @ right for _, a, b in self.blocks()])

    def transposed_times(self, left: Tensor) -> Tensor:
        """Return the product of the difference's transpose and a matrix ``[rows, k]``, in float64."""
        product = torch.zeros(self.shape[1], left.shape[1], dtype=torch.float64)
        for start, a, b in self.blocks():
            product.addmm_((b.double() - a.double()).T, left[start : start + len(a)])
        return product

    def sums(self) -> _Sums:
        """Compute the sums in one pass."""
        rows, columns = self.shape
        by_row = torch.zeros(4, rows, dtype=torch.float64)
        by_column = torch.zeros(4, columns, dtype=torch.float64)
        most = update = 0.0
        for start, a, b in self.blocks():
            wide_a, wide_b = a.double(), b.double()
            change, noise = wide_b - wide_a, _rounding_variance(wide_b, _rounded_to(a.dtype, b))
            most = largest(most, float(change.abs().max()))
            update += float(change.square().sum())
            for at, values in enumerate(((change != 0).double(), noise, wide_a * wide_b, wide_a.square())):
                by_row[at, start : start + len(a)] = values.sum(1)
                by_column[at] += values.sum(0)
        return _Sums(
            most,
            update,
            float(by_row[3].sum()),
            int(by_row[0].sum()),
            by_row[0] > 0,
            by_column[0] > 0,
            by_row[1],
            by_column[1],
            (by_row[2], by_row[3]),
            (by_column[2], by_column[3]),
        )

    def left_by_scaling(self, scale: Tensor) -> float:
        """Return the squared norm of the difference that remains after the base has been scaled.

        ``scale`` is ``[rows, 1]`` or ``[1, columns]``.
        """
        left = 0.0
        for start, a, b in self.blocks():
            factors = scale[start : start + len(a)] if scale.shape[1] == 1 else scale
            left += float((b.double() - a.double() * factors).square_().sum())
        return left


def difference(pair: Matrices, *, matrix: bool) -> Difference:
    """Measure the difference between two tensors that are not equal.

    Args:
        pair: the two tensors.
        matrix: whether rows and columns are meaningful, so that a rank is estimated.
    """
    sums = pair.sums()
    rows, columns = pair.shape
    norm = math.sqrt(sums.update / sums.base) if sums.base else math.inf
    result = Difference(sums.largest, norm, sums.changed / max(1, rows * columns), cause="vector")
    if not math.isfinite(sums.update) or not matrix:
        return result
    result = replace(result, rows=int(sums.rows.sum()), columns=int(sums.columns.sum()), cause="full")
    # Rows and columns that are equal on both sides have no rounding noise.
    row_noise, column_noise = sums.row_noise * sums.rows, sums.column_noise * sums.columns
    noise = min(float(row_noise.sum()), float(column_noise.sum()))
    spread = math.sqrt(float(row_noise.max())) + math.sqrt(float(column_noise.max()))
    scaling = _scaling(pair, sums, noise)
    if scaling is not None:
        return replace(result, cause=scaling[0], explained=scaling[1])
    changed = (result.rows or 0, result.columns or 0)
    estimate = estimate_rank(pair.times, pair.transposed_times, changed, pair.shape, spread)
    if estimate is not None:
        rank, squares = estimate
        cause: Cause = "low rank" if rank else "rounding"
        return replace(result, rank=rank, explained=min(1.0, squares / sums.update), cause=cause)
    filled = sums.changed / max(1, (result.rows or 0) * (result.columns or 0))
    if filled >= 0.5 and (result.rows or 0) < rows:
        return replace(result, cause="rows")
    return replace(result, cause="entries") if filled < 0.5 else result


def _scaling(pair: Matrices, sums: _Sums, noise: float) -> tuple[Cause, float] | None:
    """Return the cause and the explained share if scaling rows or columns explains all but rounding; otherwise None.

    With a single row or column, scaling cannot be distinguished from other changes.
    """
    directions: list[tuple[Cause, Tensor, tuple[Tensor, Tensor], tuple[int, int]]] = [
        ("row scaling", sums.rows, sums.row_products, (-1, 1)),
        ("column scaling", sums.columns, sums.column_products, (1, -1)),
    ]
    for cause, changed, (products, squares), shape in directions:
        if min(pair.shape) < 2 or int(changed.sum()) < 2:
            continue
        scale = torch.where(squares > 0, products / squares.clamp_min(1e-300), 1.0)
        # |b|^2 - <a, b>^2 / |a|^2 remains, up to cancellation; a second pass is worthwhile only if this is small.
        rough = sums.base + 2 * float((products - squares).sum()) + sums.update - float((scale * products).sum())
        if rough > 0.02 * sums.update + 4 * noise + 1e-9 * sums.base:
            continue
        left = pair.left_by_scaling(scale.view(shape))
        if left <= 4 * noise + 1e-20 * sums.base and left < 0.5 * sums.update:
            return cause, 1 - left / sums.update
    return None


def _rounded_to(base: torch.dtype, other: Tensor) -> torch.dtype:
    """Return the dtype to which values were rounded: the base's if it represents all of them, otherwise their own."""
    if not (base.is_floating_point and other.dtype.is_floating_point):
        return torch.float64
    wider = torch.finfo(other.dtype).eps < torch.finfo(base).eps
    return base if wider and bool((other.to(base).to(other.dtype) == other).all()) else other.dtype


def _rounding_variance(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the variance that rounding adds to each float64 value: a twelfth of its squared unit in the last place."""
    return power_below(values, dtype).mul_(torch.finfo(dtype).eps).square_().div_(12)
