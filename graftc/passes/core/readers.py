"""Readers: which use of a stored weight a call is."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import fx

from graftc.passes.core.layout import Layout
from graftc.passes.core.rows import Rows
from graftc.passes.core.uses import Dense, Experts, Kernel, Left, Lookup, Use
from graftc.passes.core.views import View, view_of

aten = torch.ops.aten


def linear_use(node: fx.Node) -> Use | None:
    """What ``node`` computes from a stored weight, or None where it is no linear map or its weight is more than a
    view of a stored tensor."""
    read = _READERS.get(node.target) if node.op == "call_function" else None
    if read is None and node.op == "call_function" and "grouped_mm" in getattr(node.target, "__name__", ""):
        read = _grouped
    return read(node) if read is not None else None


def _product(node: fx.Node, x: int, w: int, b: int | None, *, out_first: bool) -> Use | None:
    """A product of argument ``x`` with the weight at ``w``, whose ``out`` axis is the first of its last two or not."""
    if len(node.args) <= max(x, w) or not isinstance(node.args[x], fx.Node) or not isinstance(node.args[w], fx.Node):
        return None
    view = view_of(node.args[w])
    if view is None or view_of(node.args[x]) is not None:
        return None
    if view.source.meta["val"].dim() == 3:
        return _experts(node, x, w, view, out_first=out_first)
    bias = node.args[b] if b is not None and len(node.args) > b else None
    traced = view.rows(out_axis=0 if out_first else 1)
    if traced is None or (bias is not None and not isinstance(bias, fx.Node)):
        return None
    rows, flipped, in_features = traced
    name = None
    if isinstance(bias, fx.Node):
        held = view_of(bias)
        if held is None or held.vector_rows() != rows:
            return None
        name = str(held.source.target)
    layout = Layout.COLUMNS if flipped else Layout.ROWS
    data = node.args[x]
    if x > w and isinstance(data, fx.Node) and data.meta["val"].dim() < 2:
        return None
    made = Left if x > w else Dense
    return made(node, str(view.source.target), name, layout, in_features, rows, x, w, output=node)


def _experts(node: fx.Node, x: int, w: int, view: View, *, out_first: bool) -> Use | None:
    """One matrix per expert: the operand picks experts and swaps the matrix axes, nothing else."""
    swapped = view.swaps_matrix()
    if swapped is None:
        return None
    leading, *sizes = (int(size) for size in view.source.meta["val"].shape)
    out_in = out_first != swapped
    out, into = sizes if out_in else sizes[::-1]
    layout = Layout.ROWS if out_in else Layout.COLUMNS
    name = str(view.source.target)
    return Experts(node, name, None, layout, into, Rows(out), x, w, output=node, leading=(leading,), view=view)


def _addmm(node: fx.Node) -> Use | None:
    return None if node.kwargs else _product(node, 1, 2, 0, out_first=False)


def _matmul(node: fx.Node) -> Use | None:
    return _product(node, 0, 1, None, out_first=False) or _left(node)


def _left(node: fx.Node) -> Use | None:
    found = _product(node, 1, 0, None, out_first=True)
    return None if isinstance(found, Experts) else found


def _baddbmm(node: fx.Node) -> Use | None:
    return None if node.kwargs else _product(node, 1, 2, None, out_first=False)


def _grouped(node: fx.Node) -> Use | None:
    found = None if node.kwargs else _product(node, 0, 1, None, out_first=False)
    return found if isinstance(found, Experts) else None


def _conv(node: fx.Node) -> Use | None:
    x, weight, bias = node.args[0], node.args[1], node.args[2] if len(node.args) > 2 else None
    view = view_of(weight)
    if not (isinstance(x, fx.Node) and isinstance(weight, fx.Node)) or view is None or not view.is_whole():
        return None
    shape = [int(size) for size in weight.meta["val"].shape]
    if x.meta["val"].dim() != len(shape) or not (bias is None or (isinstance(bias, fx.Node) and bias.op == "get_attr")):
        return None
    name = None if bias is None else str(bias.target)
    rows = Rows(shape[0])
    return Kernel(node, str(view.source.target), name, Layout.KERNEL, math.prod(shape[1:]), rows, 0, 1, output=node)


def _embedding(node: fx.Node) -> Use | None:
    table, indices = node.args[:2]
    if not (isinstance(table, fx.Node) and table.op == "get_attr" and isinstance(indices, fx.Node)):
        return None
    entries, width = (int(size) for size in table.meta["val"].shape)
    name = str(table.target)
    return Lookup(node, name, None, Layout.COLUMNS, entries, Rows(width), 1, 0, output=node)


_READERS: Mapping[Any, Callable[[fx.Node], Use | None]] = {
    aten.linear.default: partial(_product, x=0, w=1, b=2, out_first=True),
    aten.addmm.default: _addmm,
    aten.mm.default: _matmul,
    aten.bmm.default: _matmul,
    aten.matmul.default: _matmul,
    aten.baddbmm.default: _baddbmm,
    aten.conv1d.default: _conv,
    aten.conv2d.default: _conv,
    aten.conv3d.default: _conv,
    aten.conv1d.padding: _conv,
    aten.conv2d.padding: _conv,
    aten.conv3d.padding: _conv,
    aten.embedding.default: _embedding,
}
