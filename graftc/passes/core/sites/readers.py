"""Recognises calls that use a stored weight as a linear map."""

from __future__ import annotations

import torch
from torch import fx

from graftc.passes.core.ir.program import above, is_random
from graftc.passes.core.sites.calls import ProductOperands, is_grouped, op_name, products
from graftc.passes.core.sites.uses import Convolution, Dense, Experts, LeftProduct, Lookup, Use
from graftc.passes.core.sites.views import View, view_of
from graftc.passes.core.weights.weight_slice import Layout


def linear_use(node: fx.Node) -> Use | None:
    """Return the use of a stored weight by ``node``.

    Returns None if ``node`` is not a linear map, or if its weight is not just a view of a stored tensor.
    """
    if node.op != "call_function":
        return None
    if isinstance(node.target, torch._ops.OpOverload) and not str(node.target).endswith((".default", ".padding")):
        return None
    name = op_name(node)
    if name == "embedding":
        return _embedding(node)
    if name in ("conv1d", "conv2d", "conv3d"):
        return _conv(node)
    uses = (_product(node, operands) for operands in products(node)) if not node.kwargs else ()
    return next((use for use in uses if use is not None), None)


def _product(node: fx.Node, operands: ProductOperands) -> Use | None:
    """Return the use for a product of a value and a matrix, or one matrix per expert; None if there is no such use."""
    given = operands.given(node)
    if given is None:
        return None
    data, operand = given
    view = view_of(operand)
    if view is None or (view_of(data) is not None and op_name(node) != "linear"):
        return None  # with two stored tensors, neither is the weight unless the operator determines which one is
    at = operands.data, operands.weight
    if view.source.meta["val"].dim() == 3:  # the view may only pick experts and swap the matrix axes
        stack = None if operands.flipped else view.matrices(out_first=operands.out_first)
        return None if stack is None else Experts(node, stack, None, *at, output=node, view=view)
    bias = node.args[operands.bias] if operands.bias is not None and len(node.args) > operands.bias else None
    weight = view.matrix(out_axis=0 if operands.out_first else 1)
    if weight is None or is_grouped(node) or (bias is not None and not isinstance(bias, fx.Node)):
        return None
    addend = None
    if isinstance(bias, fx.Node):
        bias_view = view_of(bias)
        addend = None if bias_view is None else bias_view.vector()
        stored = addend is not None and addend == weight.companion(addend.tensor)
        if not stored and (op_name(node) != "linear" or not _of_tensors_alone(bias)):
            return None
        addend = addend if stored else None
    if operands.flipped and data.meta["val"].dim() < 2:
        return None
    use_class = LeftProduct if operands.flipped else Dense
    return use_class(node, weight, addend, *at, output=node)


def _of_tensors_alone(node: fx.Node) -> bool:
    """Return whether a value is computed only from stored tensors and constants, without random numbers."""
    return all(each.op in ("get_attr", "call_function") and not is_random(each) for each in above([node]))


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
    return Convolution(node, kernel, None if bias is None else kernel.companion(str(bias.target)), 0, 1, output=node)


def _embedding(node: fx.Node) -> Use | None:
    table, indices = node.args[:2]
    if not (isinstance(table, fx.Node) and table.op == "get_attr" and isinstance(indices, fx.Node)):
        return None
    return Lookup(node, View((table,)).slice(Layout.COLUMNS), None, 1, 0, output=node)
