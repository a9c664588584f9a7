"""Calls that multiply a value by a weight: one table of their operands' positions serves both roles and sites."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import fx


def op_name(node: fx.Node) -> str:
    """Return a node's operator name without namespace, overload and in-place suffix; empty if it calls no function."""
    return _name(node.target) if node.op == "call_function" else ""


@cache
def _name(target: Any) -> str:
    if isinstance(target, torch._ops.OpOverload):
        name = str(target).split(".")[1]
        return name if name.endswith("__") else name.removesuffix("_")
    return "getitem" if target is operator.getitem else getattr(target, "__name__", str(target))


@dataclass(frozen=True)
class ProductOperands:
    """The positions of a product's operands among a call's arguments.

    Attributes:
        data, weight: positions of the value and of the matrix; ``weight`` is the smaller of the two if the matrix comes
            first.
        out_first: whether the map's rows are along the first of the matrix's last two axes instead of the last.
        bias: position of the addend that has one entry for each row of the map; None if the call has no such addend.
    """

    data: int
    weight: int
    out_first: bool
    bias: int | None = None

    @property
    def flipped(self) -> bool:
        """Whether the matrix comes before the value: the map's output columns are then the rows of the result."""
        return self.weight < self.data

    def given(self, node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
        """Return a call's value and matrix, or None if one of them is not a node."""
        if len(node.args) <= max(self.data, self.weight):
            return None
        data, weight = node.args[self.data], node.args[self.weight]
        return (data, weight) if isinstance(data, fx.Node) and isinstance(weight, fx.Node) else None


_EITHER = (ProductOperands(0, 1, False), ProductOperands(1, 0, True))
_PRODUCTS: dict[str, tuple[ProductOperands, ...]] = {
    "linear": (ProductOperands(0, 1, True, bias=2),),
    "addmm": (ProductOperands(1, 2, False, bias=0),),
    "baddbmm": (ProductOperands(1, 2, False),),
    "mm": _EITHER,
    "bmm": _EITHER,
    "matmul": _EITHER,
}
_GROUPED = (ProductOperands(0, 1, False),)
_CONVOLUTIONS = frozenset({"conv1d", "conv2d", "conv3d", "convolution", "conv_transpose1d", "conv_transpose2d"})


def products(node: fx.Node) -> tuple[ProductOperands, ...]:
    """Return the ways in which a call may be the product of a value and a matrix, most likely first.

    The result is empty if the call is not a product.
    """
    return _GROUPED if is_grouped(node) else _PRODUCTS.get(op_name(node), ())


def is_grouped(node: fx.Node) -> bool:
    """Return whether a call multiplies groups of rows, each by its own matrix."""
    return "grouped_mm" in op_name(node)


def is_convolution(node: fx.Node) -> bool:
    """Return whether a call is a convolution of its first argument with the second as the kernel."""
    return op_name(node) in _CONVOLUTIONS
