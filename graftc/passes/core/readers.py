"""Readers: which use of a stored weight a call is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import fx

from graftc.passes.core.uses import Dense, Experts, Kernel, Left, Lookup, Use
from graftc.passes.core.views import View, view_of
from graftc.passes.core.weight_slice import Layout

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
    weight = view.matrix(out_axis=0 if out_first else 1)
    if weight is None or (bias is not None and not isinstance(bias, fx.Node)):
        return None
    addend = None
    if isinstance(bias, fx.Node):
        held = view_of(bias)
        addend = None if held is None else held.vector()
        if addend is None or addend != weight.companion(addend.tensor):
            return None
    data = node.args[x]
    if x > w and isinstance(data, fx.Node) and data.meta["val"].dim() < 2:
        return None
    made = Left if x > w else Dense
    return made(node, weight, addend, x, w, output=node)


def _experts(node: fx.Node, x: int, w: int, view: View, *, out_first: bool) -> Use | None:
    """One matrix per expert: the operand picks experts and swaps the matrix axes, nothing else."""
    weight = view.matrices(out_first=out_first)
    return None if weight is None else Experts(node, weight, None, x, w, output=node, view=view)


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
    if x.meta["val"].dim() != weight.meta["val"].dim():
        return None
    if not (bias is None or (isinstance(bias, fx.Node) and bias.op == "get_attr")):
        return None
    kernel = view.slice(Layout.KERNEL)
    return Kernel(node, kernel, None if bias is None else kernel.companion(str(bias.target)), 0, 1, output=node)


def _embedding(node: fx.Node) -> Use | None:
    table, indices = node.args[:2]
    if not (isinstance(table, fx.Node) and table.op == "get_attr" and isinstance(indices, fx.Node)):
        return None
    return Lookup(node, View((table,)).slice(Layout.COLUMNS), None, 1, 0, output=node)


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
