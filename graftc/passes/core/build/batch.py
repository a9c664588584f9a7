"""Find a value's batch axis, move it to the front, and move it back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from graftc.compat.operators import UNSAFE_VIEW
from graftc.passes.core.build.nodes import Nodes, size_of
from graftc.passes.core.ir.program import Program
from graftc.passes.core.ir.shapes import expression
from graftc.specs.errors.diagnostics import GraftError

aten = torch.ops.aten
Call = Callable[..., fx.Node]
"""A function that inserts a call, such as `Builder.call`."""

BATCH = "batch"
"""The name of an input's batch axis."""


def batch_input(program: Program) -> fx.Node | None:
    """Return an input whose first axis is the batch axis, or None if there is none."""
    inputs = zip(program.inputs, program.placeholders(), strict=True)
    return next((node for spec, node in inputs if spec.shape[:1] == (BATCH,)), None)


class Batch:
    """The batch axis of one Program's values.

    Args:
        nodes: the `Nodes` that insert calls into the Program.

    Raises:
        GraftError: GC037 if no input has a batch axis.
    """

    def __init__(self, nodes: Nodes) -> None:
        source = batch_input(nodes.program)
        if source is None:
            message = f"none of the inputs {', '.join(nodes.program.signature)} has a dynamic batch axis"
            raise GraftError("GC037", message, hint="choose for the whole call")
        self._nodes, self._source = nodes, source
        self._size = expression(source.meta["val"].shape[0])
        self._first: dict[fx.Node, fx.Node] = {}

    @property
    def size(self) -> Any:
        """The number of rows in the batch, as a symbolic size."""
        return self._source.meta["val"].shape[0]

    def first(self, node: fx.Node, where: str) -> fx.Node:
        """Return ``node`` with the batch axis first, ``[batch, ...]``.

        Raises:
            GraftError: GC037 if no axis is the batch axis or has the batch axis folded into it.
        """
        if node not in self._first:
            self._first[node] = self._put_first(node, where)
        return self._first[node]

    def _put_first(self, node: fx.Node, where: str) -> fx.Node:
        axis = self._axis(node)
        if axis == 0:
            return node
        if axis is not None:
            return self._nodes.call(aten.movedim.int, node, axis, 0, part="rows first")
        if not self._folded(node):
            message = f"{node.name} at {where} has no batch axis"
            raise GraftError("GC037", message, hint="leave the site out, or choose for the whole call")
        rest = [size_of(self._nodes, node, i) for i in range(1, node.meta["val"].dim())]
        rows = self._nodes.call(aten.sym_size.int, self._source, 0, part="rows")
        return self._nodes.call(aten.view.default, node, [rows, -1, *rest], part="rows first")

    def home(self, node: fx.Node, like: fx.Node) -> fx.Node:
        """Move the batch axis from the front back to its position in ``like``, whose last axis may differ in size."""
        axis = self._axis(like)
        if axis == 0:
            return node
        if axis is not None:
            return self._nodes.call(aten.movedim.int, node, 0, axis, part="rows home")
        return self._nodes.call(aten.flatten.using_ints, node, 0, 1, part="rows home")

    def _axis(self, node: fx.Node) -> int | None:
        sizes = [expression(size) for size in node.meta["val"].shape]
        return next((i for i, size in enumerate(sizes) if size == self._size), None)

    def _folded(self, node: fx.Node) -> bool:
        """Return whether a view has folded the batch axis and other axes into the first axis."""
        size = expression(node.meta["val"].shape[0])
        if isinstance(size, int) or not size.has(self._size):
            return False
        pending, seen = [node], {node}
        while pending:
            current = pending.pop()
            for source in current.all_input_nodes:
                value = source.meta.get("val")
                if not isinstance(value, Tensor) or not value.dim() or source in seen:
                    continue
                first = expression(value.shape[0])
                if first == self._size and current.target in _FOLDING:
                    return True
                if first == size and current.target not in _MIXING:
                    seen.add(source)
                    pending.append(source)
        return False


_FOLDING = frozenset({aten.view.default, aten.reshape.default, aten.flatten.using_ints, UNSAFE_VIEW})
_MIXING = frozenset({aten.index_select.default, aten.index.Tensor, aten.permute.default, aten.transpose.int})
