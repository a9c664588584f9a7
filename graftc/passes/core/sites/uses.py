"""Uses: what one call computes from a stored weight, and how to apply another weight with the same inputs in its place.

Every use is a linear map ``y = W x + b`` with an *oriented* weight ``[..., out, in]``, regardless of the operator that
computes it and of how the tensor is stored: a product, a convolution (``in`` is the number of entries in a patch), one
matrix per expert (a leading axis), or a look-up in a table (a map of one-hot vectors).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from graftc.compat.operators import GROUPED_MM
from graftc.passes.core.ir.program import above
from graftc.passes.core.ir.shapes import Sizes
from graftc.passes.core.sites.views import View
from graftc.passes.core.weights.weight_slice import WeightSlice

aten = torch.ops.aten
Call = Callable[..., fx.Node]
"""The function that inserts a call: `Builder.call`."""

_ALIGNMENT = 16
"""In grouped products, the length of a row in bytes must be a multiple of this."""

PROBES = 16
"""Number of random inputs with which a map is probed."""


@dataclass(eq=False)
class Use(ABC):
    """One use of a weight in one Program.

    Attributes:
        node: the base's own call.
        weight: the rows of the stored weight that correspond to the output's columns, in order.
        bias: the corresponding entries of the bias; None if there is no bias.
        input_index: the index of `node`'s argument that is the input.
        weight_index: the index of `node`'s argument that is the weight, or is computed from it.
        output: the node that represents the result after the edits made so far.
    """

    node: fx.Node
    weight: WeightSlice
    bias: WeightSlice | None
    input_index: int
    weight_index: int
    output: fx.Node

    axis = -1
    """The axis along which the output's columns lie."""

    @property
    def grouped(self) -> bool:
        """Whether each column reads only a group of inputs, so that some columns cannot be computed separately."""
        return False

    @property
    def input_axis(self) -> int | None:
        """The axis of the input that corresponds to the weight's columns; None if no axis does."""
        return self.axis

    @property
    def scaled_axis(self) -> int | None:
        """The axis of the input along which scaling is equivalent to scaling the weight's columns; None if none is."""
        return self.input_axis

    @property
    def entries(self) -> int:
        """The number of entries along `scaled_axis`: the weight's columns, or channels of several columns each."""
        return self.in_features

    @property
    def input(self) -> fx.Node:
        """The value that the map currently reads."""
        source = self.node.args[self.input_index]
        assert isinstance(source, fx.Node)
        return source

    @property
    def addend(self) -> fx.Node | None:
        """The value that the call adds to its product, in the output's layout; None if it adds only a stored bias."""
        return None

    @property
    def addend_tensors(self) -> tuple[str, ...]:
        """The names of the stored tensors from which a bias is computed."""
        return ()

    @property
    def leading(self) -> tuple[int, ...]:
        """The sizes of the weight's axes before ``out`` and ``in``: the number of experts, or empty."""
        return self.weight.leading

    @property
    def in_features(self) -> int:
        """The weight's number of columns."""
        return self.weight.in_features

    @property
    def out_features(self) -> int:
        """The output's number of columns."""
        return self.weight.count

    @abstractmethod
    def map(self, call: Call, x: fx.Node, weight: fx.Node, part: str) -> fx.Node:
        """Return ``weight: [..., k, in]`` applied to ``x`` like the use's own weight: ``[..., k]``, columns last."""

    def low_rank(self, call: Call, x: fx.Node, a: fx.Node, b: fx.Node, scale: float) -> fx.Node:
        """Return ``scale * (b a) x`` for ``a: [..., rank, in]`` and ``b: [..., k, rank]``, as ``[..., k]``."""
        return self.widen(call, _scaled(call, self.map(call, x, a, "down"), scale), b)

    def widen(self, call: Call, hidden: fx.Node, b: fx.Node) -> fx.Node:
        """Return ``b`` applied to a result of `map`."""
        return call(aten.linear.default, hidden, b, part="up")

    def per_row(self, call: Call, x: fx.Node, value: fx.Node) -> fx.Node:
        """Return ``value: [..., rows]``, one entry per row of the weight, broadcastable to ``[..., rows]``."""
        return value

    def columns_last(self, call: Call, value: fx.Node) -> fx.Node:
        """Return a value in the output's layout as ``[..., columns]``."""
        return value

    def columns_home(self, call: Call, value: fx.Node) -> fx.Node:
        """Convert a value back to the output's layout: the inverse of `columns_last`."""
        return value

    @abstractmethod
    def probe(self, generator: torch.Generator) -> dict[fx.Node, Tensor]:
        """Return random values, float64 except for indices, for everything that the call reads from the data."""

    def _random_input(self, generator: torch.Generator, *sizes: int) -> dict[fx.Node, Tensor]:
        """Return a random input whose last axes have the given sizes and whose other axes have size 1."""
        leading = (1,) * (self.input.meta["val"].dim() - len(sizes))
        return {self.input: torch.randn(*leading, *sizes, generator=generator, dtype=torch.float64)}


class Dense(Use):
    """A product with a matrix; a bias that the model computes from stored tensors counts as an addend."""

    @property
    def addend(self) -> fx.Node | None:
        """The bias of a linear call if it is not a stored tensor, otherwise None."""
        if self.bias is not None or self.node.target is not aten.linear.default or len(self.node.args) < 3:
            return None
        bias = self.node.args[2]
        return bias if isinstance(bias, fx.Node) else None

    @property
    def addend_tensors(self) -> tuple[str, ...]:
        """The names of the stored tensors from which the addend is computed."""
        nodes = above([self.addend]) if self.addend is not None else []
        return tuple(str(node.target) for node in nodes if node.op == "get_attr")

    def map(self, call: Call, x: fx.Node, weight: fx.Node, part: str) -> fx.Node:
        """Return the linear map with this weight, applied to ``x``."""
        return call(aten.linear.default, x, weight, part=part)

    def probe(self, generator: torch.Generator) -> dict[fx.Node, Tensor]:
        """Return an input of `PROBES` random rows."""
        return self._random_input(generator, PROBES, self.in_features)


class LeftProduct(Use):
    """A product in which the matrix precedes the input: the map's output columns are the rows of the result."""

    axis = -2

    def map(self, call: Call, x: fx.Node, weight: fx.Node, part: str) -> fx.Node:
        """Return the linear map of ``x``'s columns, made contiguous, since torch otherwise selects other kernels."""
        rows = call(aten.contiguous.default, self.columns_last(call, x), part=part)
        return call(aten.linear.default, rows, weight, part=part)

    def columns_last(self, call: Call, value: fx.Node) -> fx.Node:
        """Return a value with its last two axes swapped."""
        return call(aten.transpose.int, value, -1, -2, part="columns last")

    def columns_home(self, call: Call, value: fx.Node) -> fx.Node:
        """Return a value with its last two axes swapped back."""
        return call(aten.transpose.int, value, -1, -2, part="columns home")

    def probe(self, generator: torch.Generator) -> dict[fx.Node, Tensor]:
        """Return an input of `PROBES` random columns."""
        return self._random_input(generator, self.in_features, PROBES)


class Convolution(Use):
    """A convolution: a linear map applied to the patch at every position."""

    axis = 1

    @property
    def input_axis(self) -> int | None:
        """The channel axis for an ungrouped kernel of size 1, whose columns are channels; otherwise None."""
        return 1 if self.groups == 1 and math.prod(self._kernel[1:]) == 1 else None

    @property
    def scaled_axis(self) -> int | None:
        """The channel axis."""
        return 1

    @property
    def entries(self) -> int:
        """The number of input channels."""
        return self._kernel[0] * self.groups

    @property
    def groups(self) -> int:
        """The number of channel groups, which are convolved separately."""
        return int(self._setting(6, 1))

    @property
    def grouped(self) -> bool:
        """Whether there is more than one channel group."""
        return self.groups > 1

    @property
    def _kernel(self) -> tuple[int, ...]:
        """The number of input channels in a group, and the kernel's sizes."""
        return self.weight.shape[1:]

    def map(self, call: Call, x: fx.Node, weight: fx.Node, part: str) -> fx.Node:
        """Return the convolution of ``x`` with the weight as the kernel, channels last."""
        kernel = self.weight.restore(call, weight, part)
        return self.columns_last(call, call(self.node.target, x, kernel, None, *self.node.args[3:], part=part))

    def low_rank(self, call: Call, x: fx.Node, a: fx.Node, b: fx.Node, scale: float) -> fx.Node:
        """Return the low-rank map of the patch at every position; with groups, the factors are multiplied first."""
        if self.groups == 1:
            return super().low_rank(call, x, a, b, scale)
        return self.map(call, x, call(aten.matmul.default, _scaled(call, b, scale), a, part="product"), "up")

    def across(self, call: Call, x: fx.Node, a: fx.Node, b: fx.Node, scale: float) -> fx.Node:
        """Return a low-rank map whose first factor spans all groups, as ``[..., rows]``.

        ``a: [rank, channels * kernel positions]`` has no groups; each group of rows of ``b: [rows, rank / groups]``
        reads its share of the ranks.
        """
        target: Any = self.node.target
        points = self._kernel[1:]
        down = call(aten.view.default, a, [int(a.meta["val"].shape[0]), self.entries, *points], part="down")
        hidden = _scaled(call, call(target, x, down, None, *self.node.args[3:6], 1, part="down"), scale)
        up = call(aten.view.default, b, [*b.meta["val"].shape, *(1 for _ in points)], part="up")
        ones, zeros = [1] * len(points), [0] * len(points)
        plain = target.overloadpacket.default
        return self.columns_last(call, call(plain, hidden, up, None, ones, zeros, ones, self.groups, part="up"))

    def widen(self, call: Call, hidden: fx.Node, b: fx.Node) -> fx.Node:
        """Return ``b`` applied to the hidden values, made contiguous."""
        # Otherwise torch uses different kernels for factors that require gradients and for those that do not, and equal
        # factors would not cancel exactly.
        return super().widen(call, call(aten.contiguous.default, hidden, part="contiguous"), b)

    def columns_last(self, call: Call, value: fx.Node) -> fx.Node:
        """Return a value with its channels moved to the last axis."""
        return call(aten.movedim.int, value, 1, -1, part="channels last")

    def columns_home(self, call: Call, value: fx.Node) -> fx.Node:
        """Return a value with its channels moved back to the second axis."""
        return call(aten.movedim.int, value, -1, 1, part="channels first")

    def probe(self, generator: torch.Generator) -> dict[fx.Node, Tensor]:
        """Return a random batch of two inputs whose sizes exceed the kernel's by three strides along each axis."""
        dims = len(self._kernel) - 1
        stride, dilation = (_spread(self._setting(i, 1), dims) for i in (3, 5))
        sizes = [d * (k - 1) + 1 + 3 * s for k, s, d in zip(self._kernel[1:], stride, dilation, strict=True)]
        return self._random_input(generator, 2, self.entries, *sizes)

    def _setting(self, index: int, default: Any) -> Any:
        return self.node.args[index] if len(self.node.args) > index else default


@dataclass(eq=False)
class Experts(Use):
    """A product with one matrix per expert.

    Attributes:
        view: the view that leads from the stored tensor to the operand: the picked experts and the order of axes.
    """

    view: View | None = None

    def map(self, call: Call, x: fx.Node, weight: fx.Node, part: str) -> fx.Node:
        """Return the product with one matrix per expert, aligned as the kernel requires."""
        rows = int(weight.meta["val"].shape[-2])
        weight = self._aligned(call, self._aligned(call, weight, -1, part), -2, part)
        result = self._product(call, self._aligned(call, x, -1, part), weight, part)
        return (
            result if result.meta["val"].shape[-1] == rows else call(aten.slice.Tensor, result, -1, 0, rows, part=part)
        )

    def low_rank(self, call: Call, x: fx.Node, a: fx.Node, b: fx.Node, scale: float) -> fx.Node:
        """Return the low-rank map of each expert, with the rank aligned as the kernel requires."""
        return super().low_rank(call, x, self._aligned(call, a, -2, "down"), self._aligned(call, b, -1, "up"), scale)

    def _aligned(self, call: Call, value: fx.Node, axis: int, part: str) -> fx.Node:
        """Return a value padded with zeros along an axis to the alignment that the kernel requires (16-byte rows)."""
        tensor = value.meta["val"]
        unit = _ALIGNMENT // tensor.element_size() if self.node.target is GROUPED_MM else 1
        missing = -tensor.shape[axis] % unit
        if not missing:
            return value
        return call(aten.constant_pad_nd.default, value, [0, 0] * (-axis - 1) + [0, missing], part=part)

    def _product(self, call: Call, x: fx.Node, weight: fx.Node, part: str) -> fx.Node:
        assert self.view is not None
        stored = self.weight.restore(call, weight, part)
        operand = self.view.replay(lambda target, *args: call(target, *args, part=part), stored)
        target = aten.bmm.default if self.node.target is aten.baddbmm.default else self.node.target
        plain = target in (aten.bmm.default, aten.linear.default)
        return call(target, x, operand, *(() if plain else self.node.args[self.weight_index + 1 :]), part=part)

    def widen(self, call: Call, hidden: fx.Node, b: fx.Node) -> fx.Node:
        """Return ``b`` applied to a result of `map`, with one matrix per expert."""
        return self.map(call, hidden, b, "up")

    @property
    def addend(self) -> fx.Node | None:
        """The first argument of ``baddbmm``; None for other calls."""
        added = self.node.args[0] if self.node.target is aten.baddbmm.default else None
        return added if isinstance(added, fx.Node) else None

    def per_row(self, call: Call, x: fx.Node, value: fx.Node) -> fx.Node:
        """Return the values for each output row's expert, so that they broadcast to the output.

        Only the call knows the assignment of output rows to experts, so the values are obtained by applying it to ones.
        Their rows are wider than 1, because kernels require 16-byte rows.
        """
        dtype = x.meta["val"].dtype
        if value.meta["val"].dtype != dtype:
            value = call(aten.to.dtype, value, dtype, part="per expert")
        width = min(8, self.in_features)
        ones = call(aten.ones_like.default, call(aten.slice.Tensor, x, -1, 0, width, part="ones"), part="ones")
        column = call(aten.unsqueeze.default, value, -1, part="per expert")
        padded = call(aten.constant_pad_nd.default, column, [0, width - 1], part="per expert")
        return self.map(call, ones, padded, "per expert")

    def probe(self, generator: torch.Generator) -> dict[fx.Node, Tensor]:
        """Return random values for the input and for the choice of experts.

        If the call reads the rows' offsets per expert, rows are divided evenly among the experts.
        """
        sizes = Sizes(lambda symbol: PROBES)
        values: dict[fx.Node, Tensor] = {}
        for node in self._data():
            value = node.meta["val"]
            shape = sizes.shape(value)
            if value.is_floating_point():
                values[node] = torch.randn(shape, generator=generator, dtype=torch.float64)
            elif node in self.node.args:
                rows = sizes.size(self.input.meta["val"].shape[0])
                ends = torch.arange(1, shape[0] + 1) * rows // shape[0]
                values[node] = ends.to(value.dtype)
            else:
                values[node] = torch.randint(0, self.leading[0], shape, generator=generator, dtype=value.dtype)
        return values

    def _data(self) -> list[fx.Node]:
        picked = self.view.others if self.view is not None else ()
        own = [n for i, n in enumerate(self.node.args) if isinstance(n, fx.Node) and i != self.weight_index]
        return [n for n in (*own, *picked) if isinstance(n.meta["val"], Tensor)]


class Lookup(Use):
    """A look-up of rows in a table: a linear map of one-hot vectors. The columns of its weight are the table's rows."""

    @property
    def input_axis(self) -> int | None:
        """None, since the weight's columns are not entries of the input."""
        return None

    def map(self, call: Call, x: fx.Node, weight: fx.Node, part: str) -> fx.Node:
        """Return the columns of ``weight`` that the indices ``x`` select."""
        table = call(aten.t.default, weight, part=part)
        return call(aten.embedding.default, table, x, *self.node.args[2:3], part=part)

    def probe(self, generator: torch.Generator) -> dict[fx.Node, Tensor]:
        """Return the table's indices in random order, at most 4096 of them if the table is large."""
        shape = (1,) * (self.input.meta["val"].dim() - 1)
        count = self.in_features if self.in_features * self.out_features <= 2**26 else 2**12
        return {self.input: torch.randperm(self.in_features, generator=generator)[:count].reshape(*shape, -1)}


def _scaled(call: Call, node: fx.Node, scale: float) -> fx.Node:
    return node if scale == 1 else call(aten.mul.Tensor, node, scale, part="scale")


def _spread(setting: Any, dims: int) -> list[int]:
    values = list(setting) if isinstance(setting, list | tuple) else [setting]
    return values * dims if len(values) == 1 else values
