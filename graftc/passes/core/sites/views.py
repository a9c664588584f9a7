"""Views: operands computed from one stored tensor by operators that only move its entries."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, fx

from graftc.passes.core.ir.program import nodes_in
from graftc.passes.core.sites.calls import op_name
from graftc.passes.core.sites.moves import Move, moved_along, names_of
from graftc.passes.core.weights.runs import Runs, runs_of
from graftc.passes.core.weights.weight_slice import Layout, WeightSlice

_IN_PLACE = names_of(Move.COPY, Move.CAST)
_PICKING = names_of(Move.PICK)
_MOVING = _IN_PLACE | _PICKING | names_of(Move.RESHAPE, Move.PERMUTE, Move.CUT, Move.SPLIT, Move.ITEM)
"""Operators that may occur in a view. Those that repeat entries may not: a value with repeated rows is data, not the
weight of a map."""


@dataclass(frozen=True)
class View:
    """A chain of operators from a stored tensor to an operand.

    Attributes:
        chain: the nodes from the stored tensor's ``get_attr`` to the operand. Each was the first argument of the next;
            the second node may now read a trained copy instead.
    """

    chain: tuple[fx.Node, ...]

    @property
    def source(self) -> fx.Node:
        """The ``get_attr`` node of the stored tensor."""
        return self.chain[0]

    def slice(self, layout: Layout, rows: Runs | None = None) -> WeightSlice:
        """Return the slice of the stored tensor with these rows."""
        return WeightSlice(str(self.source.target), self._shape, layout, rows)

    @property
    def _shape(self) -> tuple[int, ...]:
        return tuple(int(size) for size in self.source.meta["val"].shape)

    @property
    def others(self) -> tuple[fx.Node, ...]:
        """The nodes that the chain reads besides the stored tensor: the indices of picked experts."""
        return tuple(n for node in self.chain[1:] for n in nodes_in((node.args[1:], node.kwargs)))

    def is_whole(self) -> bool:
        """Return whether the operand has the entries of the stored tensor in the same shape and order."""
        if len(self.chain) == 1:
            return True
        numbers = torch.arange(math.prod(self._shape)).reshape(self._shape)
        moved = self._run(numbers)
        return moved is not None and torch.equal(moved, numbers)

    def matrix(self, out_axis: int) -> WeightSlice | None:
        """Return the rows of a stored matrix that lie along the operand's axis ``out_axis``.

        Returns None if the stored tensor is not a matrix, if rows are permuted, or if columns are missing or permuted.
        """
        if len(self._shape) != 2:
            return None
        first, second = self._shape
        if all(op_name(node) in _IN_PLACE for node in self.chain[1:]):
            return self.slice(Layout.ROWS if out_axis == 0 else Layout.COLUMNS)
        if any(op_name(node) in _PICKING for node in self.chain):
            return None
        numbers = torch.arange(first)[:, None].expand(first, second), torch.arange(second).expand(first, second)
        by_row, by_column = (self._run(grid) for grid in numbers)
        if by_row is None or by_column is None or by_row.dim() != 2:
            return None
        if not (_is_grid(by_row, out_axis) and _is_grid(by_column, out_axis)):
            return None
        outs = [t.select(1 - out_axis, 0) for t in (by_row, by_column)]
        ins = [t.select(out_axis, 0) for t in (by_row, by_column)]
        for layout, out, into, width in (
            (Layout.ROWS, outs[0], ins[1], second),
            (Layout.COLUMNS, outs[1], ins[0], first),
        ):
            if torch.equal(into, torch.arange(width)) and bool((out[1:] > out[:-1]).all()):
                return self.slice(layout, runs_of(out))
        return None

    def vector(self) -> WeightSlice | None:
        """Return the entries of a stored vector that the operand contains.

        Returns None if the stored tensor is not a vector, or if the entries are permuted.
        """
        if len(self._shape) != 1:
            return None
        entries = self._run(torch.arange(*self._shape))
        if entries is None or entries.dim() != 1 or not bool((entries[1:] > entries[:-1]).all()):
            return None
        return self.slice(Layout.PLAIN, runs_of(entries))

    def matrices(self, *, out_first: bool) -> WeightSlice | None:
        """Return the slice of all matrices in a stored tensor with one matrix per expert.

        Their rows lie along the first of the operand's last two axes if ``out_first`` is set, otherwise along the
        second. Returns None if the chain does more than swap these two axes and pick experts.
        """
        swapped = False
        for before, node in pairwise(self.chain):
            name = op_name(node)
            if name in _IN_PLACE:
                continue
            if name == "mT" or (name in ("transpose", "swapaxes") and _swaps_last(node, before.meta["val"].dim())):
                swapped = not swapped
            elif not (name in _PICKING or name == "select") or not _picks_first(node):
                return None
        return self.slice(Layout.ROWS if out_first != swapped else Layout.COLUMNS)

    def replay(self, call: Callable[..., fx.Node], stored: fx.Node) -> fx.Node:
        """Apply the chain's operators to another tensor that has the stored tensor's leading axis."""
        operand = stored
        for node in self.chain[1:]:
            operand = call(node.target, operand, *node.args[1:], **node.kwargs)
        return operand

    def _run(self, numbers: Tensor) -> Tensor | None:
        return moved_along(((node.args[0], node) for node in self.chain[1:]), numbers)


def view_of(node: Any) -> View | None:
    """Return ``node`` as a view of a stored tensor, or None if it is not one."""
    chain: list[fx.Node] = []
    while isinstance(node, fx.Node):
        chain.insert(0, node)
        if node.op == "get_attr":
            return View(tuple(chain))
        if node.op != "call_function" or not node.args or op_name(node) not in _MOVING:
            return None
        if op_name(node) not in _PICKING and len(node.all_input_nodes) != 1:
            return None
        node = node.args[0]
    return None


def _is_grid(numbers: Tensor, out_axis: int) -> bool:
    """Return whether numbers vary along only one axis, judging by the first, middle and last slice along each axis."""
    for axis in (out_axis, 1 - out_axis):
        size = numbers.shape[axis]
        lines = [numbers.select(axis, at) for at in (0, size // 2, size - 1)]
        if all(torch.equal(line, lines[0]) for line in lines):
            return True
    return False


def only_moves(node: fx.Node) -> bool:
    """Return whether ``node`` only moves entries of its first argument, or picks some of them."""
    return node.op == "call_function" and op_name(node) in _MOVING


def _swaps_last(node: fx.Node, rank: int) -> bool:
    return {axis % rank for axis in node.args[1:] if isinstance(axis, int)} == {rank - 2, rank - 1}


def _picks_first(node: fx.Node) -> bool:
    """Return whether an indexing call selects along the first axis only."""
    where = node.args[1]
    if op_name(node) == "index":
        return isinstance(where, list | tuple) and len(where) == 1 and isinstance(where[0], fx.Node)
    return isinstance(where, int) and where == 0
