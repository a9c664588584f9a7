"""Estimate, from the graph alone, how much memory a training graph keeps for its backward pass."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, fx

from graftc.compat.operators import schema_of
from graftc.passes.core.ir.layers import layer_path, repeated_layers
from graftc.passes.core.ir.program import Program
from graftc.passes.core.ir.shapes import Sizes, expression
from graftc.passes.lowering.head import LossHead

TOKENS = 512
"""Number of tokens in the row for which sizes are computed."""

LARGE = 0.1
"""Logits count as large if their bytes are at least this fraction of all other values' bytes."""


def small_logits(program: Program, head: LossHead, *, checkpointed: bool) -> str:
    """Return why the logits of a head are not worth avoiding; empty if they are.

    The estimate counts the bytes of all values that a graph computes for one row of 512 tokens. It compares the logits,
    in each of the forms in which the loss reads them and once more for their softmax, with all other values. Views do
    not count.

    Args:
        program: the Program that contains the head.
        head: the head, as it was recognised.
        checkpointed: whether layers keep only their inputs.
    """
    sizes = Sizes(_symbols(program))
    chain = [node for node in program.graph.nodes if node in head.chain]
    logits = sum(_bytes(node, sizes) for node in chain) + max(_bytes(node, sizes, view=True) for node in chain)
    layers = repeated_layers(program) if checkpointed else set()
    others = (node for node in program.graph.nodes if node not in head.chain)
    rest = sum(_bytes(node, sizes) for node in others if layer_path(node.meta.get("module", "")) not in layers)
    rest += len(layers) * max(_bytes(term.x, sizes, view=True) for term in head.terms)
    if logits >= LARGE * rest:
        return ""
    return f"its logits are only {logits / max(rest, 1):.0%} of the other values"


def _symbols(program: Program) -> Any:
    """Return a function that maps symbols to sizes for one row: 1 for first axes of inputs, `TOKENS` for all others."""
    inputs = [node.meta["val"] for node in program.placeholders()]
    rows = {str(expression(value.shape[0])) for value in inputs if isinstance(value, Tensor) and value.dim()}
    return lambda symbol: 1 if symbol in rows else TOKENS


def _bytes(node: fx.Node, sizes: Sizes, *, view: bool = False) -> int:
    """Return the bytes of the floating-point tensors that a call creates."""
    if node.op != "call_function" or not (view or _is_new(node)):
        return 0
    value = node.meta.get("val")
    values = value if isinstance(value, list | tuple) else [value]
    floats = [v for v in values if isinstance(v, Tensor) and v.is_floating_point()]
    return sum(int(math.prod(sizes.shape(v))) * v.dtype.itemsize for v in floats)


def _is_new(node: fx.Node) -> bool:
    """Return whether a call creates a new tensor: casts to the same dtype and views do not."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or not any(r.alias_info for r in schema_of(target).returns):
        return isinstance(target, torch._ops.OpOverload)
    source = node.args[0]
    value = source.meta.get("val") if isinstance(source, fx.Node) else None
    return isinstance(value, Tensor) and isinstance(node.meta["val"], Tensor) and value.dtype != node.meta["val"].dtype
