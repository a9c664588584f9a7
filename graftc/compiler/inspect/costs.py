"""Compute the per-token cost of graph nodes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from graftc.compat.operators import schema_of
from graftc.passes.core.ir.program import Program
from graftc.passes.core.ir.shapes import Sizes
from graftc.passes.core.sites.sites import linear_use
from graftc.passes.core.sites.uses import Lookup

aten = torch.ops.aten
BATCH, SEQUENCE = 2, 3
"""Batch and sequence sizes at which FLOPs are counted; the count is divided by the number of tokens."""

TOKENS = 512
"""Row length, in tokens, at which bytes are counted: in shorter rows, values computed once would dominate."""


class Costs:
    """FLOPs and bytes per token of a Program's nodes.

    Args:
        program: the Program that contains the nodes.
    """

    def __init__(self, program: Program) -> None:
        batches = {
            str(getattr(getattr(size, "node", None), "expr", size))
            for spec, node in zip(program.inputs, program.placeholders(), strict=True)
            for axis, size in zip(spec.shape, node.meta["val"].shape, strict=True)
            if axis == "batch"
        }
        rows = any("sequence" in s.shape for s in program.inputs)
        self._sizes = Sizes(lambda symbol: BATCH if symbol in batches else SEQUENCE)
        self._tokens = BATCH * (SEQUENCE if rows else 1)
        self._long = Sizes(lambda symbol: 1 if symbol in batches else TOKENS)
        self._long_tokens = TOKENS if rows else 1

    def flops(self, node: fx.Node) -> float:
        """Return twice the number of multiply-adds in a matrix product; 0 for other nodes."""
        summed = _summed(node)
        value = node.meta.get("val")
        if not summed or not isinstance(value, Tensor):
            return 0.0
        count: float = 2 * math.prod(self._sizes.shape(value)) * math.prod(self._sizes.size(size) for size in summed)
        return count / self._tokens

    def total_flops(self, nodes: Iterable[fx.Node]) -> float:
        """Return the sum of `flops` over several nodes."""
        return sum(map(self.flops, nodes))

    def value_bytes(self, node: fx.Node) -> float:
        """Return the bytes per token of a call's result, in a row of `TOKENS` tokens; 0 for views and non-calls."""
        value = node.meta.get("val")
        if node.op != "call_function" or not isinstance(value, Tensor) or _is_view(node):
            return 0.0
        return math.prod(self._long.shape(value)) * value.element_size() / self._long_tokens


def _is_view(node: fx.Node) -> bool:
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return True
    return any(returned.alias_info is not None for returned in schema_of(target).returns)


def _summed(node: fx.Node) -> Sequence[Any]:
    """Return the sizes of the axes over which a product sums; empty for other nodes."""
    use = linear_use(node) if node.op == "call_function" else None
    if use is not None:
        return () if isinstance(use, Lookup) else (use.in_features,)
    operand = node.args[_CONTRACTED[node.target]] if node.target in _CONTRACTED else None
    return operand.meta["val"].shape[-1:] if isinstance(operand, fx.Node) else ()


_CONTRACTED: Mapping[Any, int] = {
    aten.linear.default: 0,
    aten.addmm.default: 1,
    aten.mm.default: 0,
    aten.bmm.default: 0,
    aten.matmul.default: 0,
}
