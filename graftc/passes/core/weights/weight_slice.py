"""Weight slices: rows of a stored weight, and the only conversion between stored tensors and the operands of maps.

A map's *operand* is its weight as a matrix ``[..., rows, in]``, however the Store holds it. Only `WeightSlice.operand`
and `WeightSlice.put_operand` (for values) and `WeightSlice.read_operand` and `WeightSlice.restore` (for nodes) define
how an operand corresponds to the stored tensor. To support another way of storing weights, add a `Layout` that these
four methods handle.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import partial

import torch
from torch import Tensor, fx

from graftc.passes.core.weights import runs
from graftc.passes.core.weights.runs import Emit, Index, Runs

aten = torch.ops.aten
_SMALL = 2**31
"""Indices into tensors with fewer entries than this are 32-bit."""


def index_type(count: int) -> torch.dtype:
    """Return the dtype of indices into a tensor with ``count`` entries."""
    return torch.int32 if count < _SMALL else torch.int64


class Layout(StrEnum):
    """The order of axes in which the Store holds a weight whose oriented form is ``[..., out, in]``."""

    ROWS = "rows"
    """Also stored as ``[..., out, in]``."""
    COLUMNS = "columns"
    """Stored with the last two axes swapped: ``[..., in, out]``."""
    KERNEL = "kernel"
    """A convolution's kernel, ``[out, in, *kernel]``; its columns are the entries of a patch."""
    PLAIN = "plain"
    """Not a matrix: a tensor that is used as it is stored, with rows along its first axis."""


@dataclass(frozen=True)
class WeightSlice:
    """Some rows of a stored weight.

    Two slices are equal if their names, shapes, layouts and rows are; use `as_stored` to compare different layouts.

    Attributes:
        tensor: name of the weight in the Store.
        shape: the weight's shape as it is stored.
        layout: how the weight is viewed as a matrix.
        rows: the rows of that matrix, as ascending half-open runs; None for all rows. In the plain layout, rows are
            along the first axis.

    Raises:
        ValueError: if the runs are not ascending, or extend beyond the last row.
    """

    tensor: str
    shape: tuple[int, ...]
    layout: Layout = Layout.PLAIN
    rows: Runs | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", tuple(self.shape))
        if self.rows is None:
            return
        edges = [edge for run in self.rows for edge in run]
        if not all(a <= b for a, b in zip([0, *edges], [*edges, self.total], strict=True)):
            raise ValueError(f"{self.rows} are not ascending runs of the {self.total} rows of {self.tensor}")
        merged = runs.joined(self.rows)
        object.__setattr__(self, "rows", None if merged == ((0, self.total),) else merged)

    @classmethod
    def every(cls, tensor: str, stored: Tensor) -> WeightSlice:
        """Return the slice that covers a whole stored tensor."""
        return cls(tensor, tuple(stored.shape))

    # --- rows and sizes ------------------------------------------------------------------------------------

    @property
    def axis(self) -> int:
        """The axis of the stored tensor along which the rows lie, counted from 0."""
        back = {Layout.ROWS: 2, Layout.COLUMNS: 1}.get(self.layout)
        return 0 if back is None else len(self.shape) - back

    @property
    def total(self) -> int:
        """The whole weight's number of rows; 1 for a scalar."""
        return self.shape[self.axis] if self.shape else 1

    @property
    def whole(self) -> bool:
        """Whether the slice has all rows."""
        return self.rows is None

    @property
    def spans(self) -> Runs:
        """The slice's runs; a single run if it has all rows."""
        return ((0, self.total),) if self.rows is None else self.rows

    @property
    def count(self) -> int:
        """The number of rows in the slice."""
        return sum(end - start for start, end in self.spans)

    @property
    def own_shape(self) -> tuple[int, ...]:
        """The shape of the result of `take`."""
        return tuple(self.count if axis == self.axis else size for axis, size in enumerate(self.shape))

    @property
    def size(self) -> int:
        """The number of entries in the slice."""
        return math.prod(self.own_shape)

    @property
    def numel(self) -> int:
        """The number of entries in the whole tensor."""
        return math.prod(self.shape)

    @property
    def leading(self) -> tuple[int, ...]:
        """The sizes of the operand's axes before rows and columns: the number of experts, or empty."""
        return self.shape[:-2] if self.layout in (Layout.ROWS, Layout.COLUMNS) else ()

    @property
    def in_features(self) -> int:
        """The operand's number of columns."""
        back = {Layout.ROWS: 1, Layout.COLUMNS: 2}.get(self.layout)
        return math.prod(self.shape[1:]) if back is None else self.shape[-back]

    @property
    def part(self) -> str:
        """The name of the tensor within its module."""
        return self.tensor.rpartition(".")[2]

    @property
    def as_stored(self) -> WeightSlice:
        """These entries, in the plain layout if the slice is whole or its rows are along the first axis.

        This makes the slices of readers that use different layouts of the same tensor comparable.
        """
        return replace(self, layout=Layout.PLAIN) if self.whole or self.axis == 0 else self

    def at(self, rows: Runs | None) -> WeightSlice:
        """Return the slice with other rows of the same weight."""
        return replace(self, rows=rows)

    def picked(self, numbers: Tensor) -> WeightSlice:
        """Return the slice of the same weight's rows with these indices, which must be ascending."""
        return self.at(runs.runs_of(numbers))

    def companion(self, tensor: str) -> WeightSlice:
        """Return the same slice of a vector that has one entry for each row, such as a bias."""
        return WeightSlice(tensor, (self.total,), Layout.PLAIN, self.rows)

    def overlaps(self, other: WeightSlice) -> bool:
        """Return whether the slices share an entry; rows along different axes of a tensor always do."""
        if self.tensor != other.tensor or not (self.size and other.size):
            return False
        return self.axis != other.axis or runs.meet(self.spans, other.spans)

    def covers(self, other: WeightSlice) -> bool:
        """Return whether the slice contains all entries of ``other``."""
        if self.tensor != other.tensor:
            return False
        return self.whole or (self.axis == other.axis and runs.contains(self.spans, other.spans))

    def within(self, other: WeightSlice) -> WeightSlice:
        """Return the slice that selects these rows from the part that ``other``, which covers them, selects."""
        rows = self.rows if other.axis != self.axis else runs.places(self.spans, other.spans)
        return WeightSlice(self.tensor, other.own_shape, self.layout, rows)

    def index(self, device: torch.device | None = None) -> Tensor:
        """Return the indices of the rows, ``int64[count]``."""
        return torch.cat([torch.arange(0, device=device), *(torch.arange(a, b, device=device) for a, b in self.spans)])

    def __str__(self) -> str:
        return "all" if self.rows is None else f"rows {','.join(f'{a}:{b}' for a, b in self.rows)}"

    def blocks(self, most: int) -> Iterator[tuple[int, WeightSlice]]:
        """Yield consecutive parts of nearly equal size, each preceded by the position of its first row in the slice.

        Args:
            most: maximum number of rows in a part, at least 1.
        """
        parts = max(1, -(-self.count // most))
        ends = [self.count * number // parts for number in range(1, parts + 1)]
        for start, end in zip([0, *ends], ends, strict=False):
            yield start, self.at(runs.window(self.spans, start, end))

    # --- values as they are stored -------------------------------------------------------------------------

    def take(self, stored: Tensor) -> Tensor:
        """Return the slice's part of a stored tensor, in the stored layout; the tensor itself if the slice is whole."""
        return stored if self.whole else stored.index_select(self.axis, self.index(stored.device))

    def put(self, stored: Tensor | None, own: Tensor) -> Tensor:
        """Return a copy of a stored tensor with ``own`` as the slice's part; ``own`` itself if the slice is whole."""
        if self.whole:
            return own
        assert stored is not None
        return stored.index_copy(self.axis, self.index(stored.device), own)

    @property
    def _node_axis(self) -> int:
        """The `axis` as used in graphs: counted from the end unless it is the first, since matrices come last."""
        return self.axis - len(self.shape) if self.axis else 0

    def read(self, emit: Emit, node: fx.Node, index: Index, axis: int | None = None) -> fx.Node:
        """Return a node that computes the result of `take` for ``node``.

        Args:
            emit: a function that inserts calls.
            node: the stored tensor, or another value that has all rows along ``axis``.
            index: a function that creates a constant from `index`; called if there are many runs.
            axis: the node's axis along which the rows lie; by default, that of the stored tensor.
        """
        axis = self._node_axis if axis is None else axis
        return node if self.whole else runs.cut(emit, node, axis, self.spans, index)

    def write(
        self, emit: Emit, node: fx.Node, own: fx.Node, index: Index | fx.Node, axis: int | None = None
    ) -> fx.Node:
        """Return a node that computes the result of `put`: ``node`` with ``own`` as the part that `read` selects.

        Args:
            emit, node, axis: see `read`.
            own: the new part.
            index: see `read`; a node that already contains the indices is used regardless of the number of runs.
        """
        axis = self._node_axis if axis is None else axis
        if self.whole:
            return own
        if isinstance(index, fx.Node):
            return emit(aten.index_copy.default, node, axis, index, own)
        return runs.put(emit, node, own, axis, self.spans, self.total, index)

    # --- values as the map uses them -----------------------------------------------------------------------

    def operand(self, stored: Tensor) -> Tensor:
        """Return the slice of a stored tensor as the operand of its map, ``[..., rows, in]``.

        The result is a view if the slice has all rows; for a tensor that is not a matrix, it equals the result of
        `take`. No other code computes the values of an operand from a stored tensor.
        """
        every = self.oriented(stored)
        return every if self.whole else every.index_select(self.row_axis, self.index(every.device))

    def put_operand(self, stored: Tensor | None, operand: Tensor) -> Tensor:
        """Return the stored tensor with another operand for these rows: the inverse of `operand`.

        Args:
            stored: the current tensor, which is not modified; not needed if the slice has all rows.
            operand: ``[..., rows, in]``.
        """
        return self.put(stored, self.restored(operand))

    def oriented(self, part: Tensor) -> Tensor:
        """Return any of the weight's rows, given in the stored layout, as a view ``[..., k, in]``."""
        if self.layout is Layout.COLUMNS:
            return part.transpose(-1, -2)
        return part.flatten(1) if self.layout is Layout.KERNEL else part

    def views(self, stored: Tensor) -> list[Tensor]:
        """Return writable views of the slice in the stored tensor itself, ``[..., k, in]`` for each run.

        Args:
            stored: the stored tensor, contiguous.
        """
        every = self.oriented(stored if stored.dim() else stored.reshape(1))
        return [every.narrow(self.row_axis, start, end - start) for start, end in self.spans]

    def restored(self, operand: Tensor) -> Tensor:
        """Return rows in the stored layout: the inverse of `oriented`."""
        if self.layout is Layout.COLUMNS:
            return operand.transpose(-1, -2)
        return operand.reshape(operand.shape[0], *self.shape[1:]) if self.layout is Layout.KERNEL else operand

    def read_operand(self, call: Emit, node: fx.Node, index: Index) -> fx.Node:
        """Return a node that computes the result of `operand` for ``node``, the stored tensor or its replacement.

        Args:
            call: the method `Builder.call`.
            node, index: see `read`.
        """
        if self.layout is Layout.COLUMNS:
            node = call(aten.transpose.int, node, -2, -1, part="weight")
        elif self.layout is Layout.KERNEL:
            node = call(aten.flatten.using_ints, node, 1, part="weight")
        return self.read(partial(call, part="weight rows"), node, index, axis=self.row_axis)

    def restore(self, call: Emit, operand: fx.Node, part: str) -> fx.Node:
        """Return a node that computes the result of `restored` for any rows ``[..., k, in]``."""
        if self.layout is Layout.COLUMNS:
            return call(aten.transpose.int, operand, -1, -2, part=part)
        if self.layout is Layout.KERNEL:
            return call(aten.view.default, operand, [int(operand.meta["val"].shape[0]), *self.shape[1:]], part=part)
        return operand

    @property
    def row_axis(self) -> int:
        """The axis of the operand along which the rows lie: 0 in the plain layout, otherwise the second to last."""
        return 0 if self.layout is Layout.PLAIN else -2

    # --- entries by number ---------------------------------------------------------------------------------

    def entries(self, stored: Tensor) -> Tensor:
        """Return the slice's entries of a tensor with the stored shape, flattened, in the order of the tensor."""
        return self.take(stored).reshape(-1)

    def places(self, numbers: Tensor) -> Tensor:
        """Convert indices into the slice's entries to flat indices into the stored tensor, in `index_dtype`.

        Args:
            numbers: indices of the slice's entries, in the order of `entries`.
        """
        if not self.whole:
            numbers = self._every_place(numbers.device)[numbers]
        return numbers.to(self.index_dtype)

    def numbers(self, places: Tensor) -> Tensor:
        """Convert flat indices into the stored tensor to indices into the slice, ``int64``: the inverse of `places`."""
        if self.whole:
            return places.long()
        every = self._every_place(places.device)
        back = torch.empty(self.numel, dtype=torch.int64, device=places.device)
        return back.index_copy_(0, every, torch.arange(every.numel(), device=places.device))[places.long()]

    def _every_place(self, device: torch.device) -> Tensor:
        return self.entries(torch.arange(self.numel, device=device).view(self.shape))

    @property
    def index_dtype(self) -> torch.dtype:
        """The dtype of indices into the tensor: ``int32``, or ``int64`` for 2^31 or more entries."""
        return index_type(self.numel)

    def mask(self, device: torch.device | None = None) -> Tensor:
        """Return a ``bool`` mask of the slice's rows that broadcasts to the tensor: other axes have size 1."""
        own = torch.zeros(self.total, dtype=torch.bool, device=device)
        own[self.index(device)] = True
        return own.view([self.total if axis == self.axis else 1 for axis in range(len(self.shape))])
