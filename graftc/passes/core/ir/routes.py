"""Predicates for the nodes that route among an adaptation's experts."""

from __future__ import annotations

import torch
from torch import fx

from graftc.passes.core.ir.program import provenance

aten = torch.ops.aten


def is_pick(node: fx.Node) -> bool:
    """Return whether a node selects an expert by the index that a route has drawn."""
    if node.target is not aten.index_select.default or provenance(node) is None:
        return False
    chosen = node.args[2]
    return isinstance(chosen, fx.Node) and provenance(chosen) is not None and is_route(chosen)


def is_route(node: fx.Node) -> bool:
    """Return whether a node draws a random integer."""
    return node.target is aten.randint_like.low_dtype
