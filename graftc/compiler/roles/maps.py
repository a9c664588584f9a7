"""Recognise linear maps: calls that multiply a value by a stored weight, however the product is written.

Matrix products, ``einsum`` and convolutions are treated alike: output columns, numbered along some of the output's
axes, are rows of a weight. Neither the memory layout nor the axis matters.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, fx

from graftc.compiler.roles.operators import PASSING, SELECTING, beneath
from graftc.passes.core.sites.calls import is_convolution, op_name, products


@dataclass(frozen=True)
class Linear:
    """One use of a weight: ``y = x W^T``.

    Attributes:
        node, input, weight: the call, its input, and the weight's node (a parameter, or computed from parameters).
        parameter: name of the parameter behind the weight; None if it cannot be determined.
        out: number of output columns.
        experts: whether the weight is 3-D, with one matrix per expert.
        axes: output axes, counted from the end, along which columns are numbered, slowest first.
        out_axes: axes of the weight along which columns are numbered, in the same order.
        mixes: whether it also mixes positions (a convolution whose kernel is wider than 1).
        own: whether each column is computed only from the same column of the input (a depthwise convolution).
    """

    node: fx.Node
    input: fx.Node
    weight: fx.Node
    parameter: str | None
    out: int
    experts: bool = False
    axes: tuple[int, ...] = (-1,)
    out_axes: tuple[int, ...] = (0,)
    mixes: bool = False
    own: bool = False

    def numbers(self, shape: tuple[int, ...]) -> Tensor:
        """Return the column number of every output entry, as a broadcast view."""
        return columns_along(shape, self.axes)


def columns_along(shape: tuple[int, ...], axes: tuple[int, ...]) -> Tensor:
    """Return ``int64`` indices that count along some axes of this shape, slowest first, as a broadcast view."""
    places = [axis % len(shape) for axis in axes]
    sizes = [shape[place] for place in places]
    numbers = torch.arange(prod(sizes)).view(sizes)
    numbers = numbers.permute(sorted(range(len(places)), key=places.__getitem__))
    return numbers.view([size if i in places else 1 for i, size in enumerate(shape)]).expand(shape)


Weights = Callable[[fx.Node], list[fx.Node]]
"""Returns the stored matrices from which a node is computed; none if it depends on data."""
Size = Callable[[Any], int]


def read_map(node: fx.Node, weights: Weights, size: Size) -> Linear | None:
    """Return the linear map that a call computes, or None if the call is not a linear map."""
    if op_name(node) == "einsum":
        return _index_expression(node, weights, size)
    if is_convolution(node):
        return _convolution(node, weights, size)
    for operands in products(node):
        given = operands.given(node)
        if given is None:
            continue
        if operands.flipped:
            linear = _flipped(node, *given, weights, size)
        else:
            linear = _product(node, *given, 0 if operands.out_first else 1, weights, size)
        if linear is not None:
            return linear
    return None


def _name(stored: list[fx.Node]) -> str | None:
    return str(stored[0].target) if len(stored) == 1 else None


def _product(
    node: fx.Node, data: fx.Node, weight: fx.Node, out_axis: int, weights: Weights, size: Size
) -> Linear | None:
    dims = weight.meta["val"].dim()
    stored = _selected(weight)
    if dims == 3 and stored is None:
        return None
    if stored is not None:
        out = size(weight.meta["val"].shape[-1 if out_axis else -2])
        axes = (dims - 1,) if out_axis else (dims - 2,)
        return Linear(node, data, weight, str(stored.target), out, experts=True, out_axes=axes)
    parameters = weights(weight) if dims == 2 else []
    if not parameters:
        return None
    out = size(weight.meta["val"].shape[out_axis])
    return Linear(node, data, weight, _name(parameters), out, out_axes=(out_axis,))


def _flipped(node: fx.Node, data: fx.Node, weight: fx.Node, weights: Weights, size: Size) -> Linear | None:
    """Return the linear map of ``W @ x``, where the weight comes first and the result's rows are the output columns."""
    if weight.meta["val"].dim() != 2:
        return None
    parameters = weights(weight)
    if not parameters or weights(data) or data.meta["val"].dim() < 2:
        return None
    return Linear(node, data, weight, _name(parameters), size(weight.meta["val"].shape[0]), axes=(-2,))


def _selected(weight: fx.Node) -> fx.Node | None:
    """Return the stored 3-D tensor that ``weight`` is, or from which it picks one or more matrices."""
    if weight.meta["val"].dim() not in (2, 3):
        return None
    stored = beneath(weight, SELECTING | PASSING)
    value = stored.meta.get("val")
    return stored if stored.op == "get_attr" and isinstance(value, Tensor) and value.dim() == 3 else None


def _index_expression(node: fx.Node, weights: Weights, size: Size) -> Linear | None:
    """Return the linear map of an ``einsum`` of a value and a weight.

    The columns are numbered by the letters that occur only in the weight and the result.
    """
    inputs, _, output = str(node.args[0]).replace(" ", "").replace("...", ".").partition("->")
    terms, operands = inputs.split(","), node.args[1]
    if not isinstance(operands, list | tuple) or len(operands) != 2 or not output:
        return None
    first, second = operands
    if not isinstance(first, fx.Node) or not isinstance(second, fx.Node):
        return None
    if weights(second) and not weights(first):
        return _contraction(node, first, second, (terms[0], terms[1], output), weights, size)
    if weights(first) and not weights(second):
        return _contraction(node, second, first, (terms[1], terms[0], output), weights, size)
    return None


def _contraction(
    node: fx.Node, data: fx.Node, weight: fx.Node, terms: tuple[str, str, str], weights: Weights, size: Size
) -> Linear | None:
    read, letters, output = terms
    own = [a for a in letters if a in output and a not in read]
    shared = [a for a in letters if a in output and a in read]
    ellipsis = output.find(".")
    if not own or "." in letters or len(set(letters)) < len(letters) or any(ellipsis > output.index(a) for a in own):
        return None
    if any(a not in read and a not in output for a in letters):
        return None
    axes = tuple(output.index(a) - len(output) for a in own)
    out_axes = tuple(letters.index(a) for a in own)
    out = prod(size(weight.meta["val"].shape[axis]) for axis in out_axes)
    if not shared:
        return Linear(node, data, weight, _name(weights(weight)), out, axes=axes, out_axes=out_axes)
    stored = _selected(weight)
    if stored is None or len(letters) != 3 or shared != [letters[0]]:
        return None
    return Linear(node, data, weight, str(stored.target), out, experts=True, axes=axes, out_axes=out_axes)


def _convolution(node: fx.Node, weights: Weights, size: Size) -> Linear | None:
    data, weight = node.args[:2]
    if not (isinstance(data, fx.Node) and isinstance(weight, fx.Node)):
        return None
    parameters = weights(weight)
    if not parameters:
        return None
    name = op_name(node)
    shape = [size(s) for s in weight.meta["val"].shape]
    transposed = "transpose" in name or (name == "convolution" and node.args[6] is True)
    at = 8 if name == "convolution" else 6
    groups = int(node.args[at]) if len(node.args) > at else 1  # type: ignore[arg-type]
    out = shape[1] * groups if transposed else shape[0]
    mixes = any(s > 1 for s in shape[2:])
    channels = shape[0] if transposed else shape[1] * groups
    own = 1 < groups == channels == out
    axis = -(len(shape) - 1)
    out_axes = (1,) if transposed else (0,)
    return Linear(node, data, weight, _name(parameters), out, axes=(axis,), out_axes=out_axes, mixes=mixes, own=own)
