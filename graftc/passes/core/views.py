"""Views: how an operand is made from one stored tensor by operators that only move its entries."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, fx

from graftc.passes.core.program import nodes_in
from graftc.passes.core.rows import Rows, runs_of


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


_MOVING = _names(
    """
    view reshape _unsafe_view t transpose permute numpy_T mT slice select narrow split split_with_sizes chunk
    tensor_split unsafe_split unsafe_chunk unbind unsqueeze squeeze flatten unflatten swapaxes movedim getitem
    """
)
_SAME = _names("contiguous clone detach alias to _to_copy lift_fresh_copy type_as")
_PICKING = _names("index index_select")


def _name(node: fx.Node) -> str:
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.name.split("::")[1]
    return getattr(target, "__name__", "")


@dataclass(frozen=True)
class View:
    """A chain of operators from a stored tensor to an operand.

    Attributes:
        chain: nodes from the ``get_attr`` of the stored tensor to the operand. Each is the first argument of the next;
            the second's may have been replaced since, by a copy that trains.
    """

    chain: tuple[fx.Node, ...]

    @property
    def source(self) -> fx.Node:
        """The ``get_attr`` node."""
        return self.chain[0]

    @property
    def others(self) -> tuple[fx.Node, ...]:
        """What the chain reads beside the stored tensor: the numbers of picked experts."""
        return tuple(n for node in self.chain[1:] for n in nodes_in((node.args[1:], node.kwargs)))

    def is_whole(self) -> bool:
        """Whether the operand is the stored tensor, shape and order and all."""
        shape = self.source.meta["val"].shape
        if len(self.chain) == 1:
            return True
        numbers = torch.arange(math.prod(int(size) for size in shape)).reshape(*(int(size) for size in shape))
        held = self._run(numbers)
        return held is not None and torch.equal(held, numbers)

    def rows(self, out_axis: int) -> tuple[Rows, bool, int] | None:
        """For a matrix: rows of the oriented tensor that ``out_axis`` counts, whether it is stored ``[in, out]``, and
        the number of columns. None where the rows are permuted, or some columns are missing or permuted."""
        shape = self.source.meta["val"].shape
        if len(shape) != 2:
            return None
        first, second = (int(size) for size in shape)
        if len(self.chain) == 1:
            return (Rows(first), False, second) if out_axis == 0 else (Rows(second), True, first)
        if any(_name(node) in _PICKING for node in self.chain):
            return None
        numbers = torch.arange(first)[:, None].expand(first, second), torch.arange(second).expand(first, second)
        by_row, by_column = (self._run(held) for held in numbers)
        if by_row is None or by_column is None or by_row.dim() != 2:
            return None
        if not (_is_grid(by_row, out_axis) and _is_grid(by_column, out_axis)):
            return None
        outs = [t.select(1 - out_axis, 0) for t in (by_row, by_column)]
        ins = [t.select(out_axis, 0) for t in (by_row, by_column)]
        for flipped, out, into, total, width in (
            (False, outs[0], ins[1], first, second),
            (True, outs[1], ins[0], second, first),
        ):
            if torch.equal(into, torch.arange(width)) and bool((out[1:] > out[:-1]).all()):
                return Rows(total, runs_of(out)), flipped, width
        return None

    def vector_rows(self) -> Rows | None:
        """For a vector: which of its entries the operand holds; None where they are permuted."""
        shape = self.source.meta["val"].shape
        if len(shape) != 1:
            return None
        total = int(shape[0])
        held = self._run(torch.arange(total))
        if held is None or held.dim() != 1 or not bool((held[1:] > held[:-1]).all()):
            return None
        return Rows(total, runs_of(held))

    def swaps_matrix(self) -> bool | None:
        """For one matrix per expert: whether the last two axes are swapped. None where the chain does more than that
        and picking experts."""
        swapped = False
        for before, node in pairwise(self.chain):
            name = _name(node)
            if name in _SAME:
                continue
            if name == "mT" or (name in ("transpose", "swapaxes") and _swaps_last(node, before.meta["val"].dim())):
                swapped = not swapped
            elif not (name in _PICKING or name == "select") or not _picks_first(node):
                return None
        return swapped

    def replay(self, call: Callable[..., fx.Node], stored: fx.Node) -> fx.Node:
        """The same operators on another tensor, which has the stored one's leading axis."""
        held = stored
        for node in self.chain[1:]:
            held = call(node.target, held, *node.args[1:], **node.kwargs)
        return held

    def _run(self, numbers: Tensor) -> Tensor | None:
        held: Any = numbers
        for node in self.chain[1:]:
            if _name(node) in _SAME:
                continue
            assert callable(node.target)
            try:
                held = node.target(held, *node.args[1:], **node.kwargs)
            except (RuntimeError, TypeError, ValueError, IndexError):
                return None
        return held if isinstance(held, Tensor) else None


def view_of(node: Any) -> View | None:
    """The view of a stored tensor that ``node`` is, or None."""
    chain: list[fx.Node] = []
    while isinstance(node, fx.Node):
        chain.insert(0, node)
        if node.op == "get_attr":
            return View(tuple(chain))
        if node.op != "call_function" or not node.args or _name(node) not in _MOVING | _SAME | _PICKING:
            return None
        if _name(node) not in _PICKING and len(node.all_input_nodes) != 1:
            return None
        node = node.args[0]
    return None


def _is_grid(numbers: Tensor, out_axis: int) -> bool:
    """Whether numbers vary along one axis only, judged by the first, middle and last line each way."""
    for axis in (out_axis, 1 - out_axis):
        size = numbers.shape[axis]
        lines = [numbers.select(axis, at) for at in (0, size // 2, size - 1)]
        if all(torch.equal(line, lines[0]) for line in lines):
            return True
    return False


def only_moves(node: fx.Node) -> bool:
    """Whether ``node`` is a view of its first argument, or picks from it."""
    return node.op == "call_function" and _name(node) in _MOVING | _SAME | _PICKING


def _swaps_last(node: fx.Node, rank: int) -> bool:
    return {axis % rank for axis in node.args[1:] if isinstance(axis, int)} == {rank - 2, rank - 1}


def _picks_first(node: fx.Node) -> bool:
    """Whether an indexing works on the first axis only."""
    where = node.args[1]
    if _name(node) == "index":
        return isinstance(where, list | tuple) and len(where) == 1 and isinstance(where[0], fx.Node)
    return isinstance(where, int) and where == 0
