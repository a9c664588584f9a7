"""Determine which operand of a score product holds the keys, given that the softmax runs over keys."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from graftc.compiler.roles.indices import varying
from graftc.compiler.roles.maps import columns_along
from graftc.passes.core.ir.shapes import Sizes
from graftc.passes.core.sites.calls import op_name
from graftc.passes.core.sites.moves import BREAKS, HOLE, MOVES, Move, moved, names_of

_MOVING = frozenset(MOVES) - names_of(Move.COPY, Move.CAST)


def keys_are_second(product: fx.Node, between: Sequence[fx.Node], softmax: fx.Node, sizes: Sizes) -> bool | None:
    """Return whether the softmax below a product runs over the product's last axis; None if that cannot be determined.

    If no operator rearranges entries, the axis alone decides; otherwise indices along it are moved like the scores.

    Args:
        product: the call that computes the scores.
        between: the nodes from the product to the softmax's input, in graph order.
        softmax: the softmax call.
        sizes: the values of symbolic sizes.
    """
    dim = softmax.args[1]
    assert isinstance(dim, int)
    shape = sizes.shape(product.meta["val"])
    rank = len(shape)
    if all(op_name(n) not in _MOVING and _rank(n) == rank for n in between):
        return {rank - 1: True, rank - 2: False}.get(dim % rank)
    for axis, second in ((-1, True), (-2, False)):
        try:
            numbers = _moved(product, columns_along(shape, (axis,)), between, sizes)
        except BREAKS:
            continue
        axes = varying(numbers) if isinstance(numbers, Tensor) else ()
        if isinstance(numbers, Tensor) and axes:
            return second if dim % numbers.dim() in axes else not second
    return None


def _rank(node: fx.Node) -> int:
    value = node.meta.get("val")
    return value.dim() if isinstance(value, Tensor) else -1


def _moved(product: fx.Node, numbers: Tensor, between: Sequence[fx.Node], sizes: Sizes) -> Any:
    """Return the indices as they arrive at the last of these nodes."""
    values: dict[fx.Node, Any] = {product: numbers}
    for node in between:
        values[node] = _step(node, values, sizes)
    return values[between[-1]] if between else numbers


def _step(node: fx.Node, walks: Mapping[fx.Node, Any], sizes: Sizes) -> Any:
    known = [walks[n] for n in node.all_input_nodes if walks.get(n) is not None]
    if not known:
        return None
    if op_name(node) in _MOVING:

        def operand(leaf: Any) -> Any:
            if walks.get(leaf) is not None:
                return walks[leaf]
            value = leaf.meta.get("val") if isinstance(leaf, fx.Node) else leaf
            return torch.full(sizes.shape(value), HOLE) if isinstance(value, Tensor) else sizes.size(value)

        return moved(node, operand)
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or not isinstance(known[0], Tensor):
        return None
    shape = sizes.shape(value)
    return known[0].expand(shape) if known[0].dim() <= len(shape) else None
