"""Let an eval graph write new keys and values into a cache of fixed length instead of returning copies of the cache."""

from __future__ import annotations

import torch
from torch import fx

from graftc.passes.core.ir.past_inputs import SEEN, is_past
from graftc.passes.core.ir.program import Program

aten = torch.ops.aten


def write_caches(program: Program) -> Program:
    """Return a Program that updates its cache in place, or the given one if it has no cache of fixed length.

    Args:
        program: a Program in eval mode. A cache tensor is written in place if nothing else reads it, so the graph's
            outputs are the same, and the tensors that it returns for the cache are those that were passed in.
    """
    if SEEN not in program.signature:
        return program
    written = program.copy()
    for node in written.graph.find_nodes(op="call_function", target=aten.index_copy.default):
        cache = node.args[0]
        if isinstance(cache, fx.Node) and _is_cache(cache) and _values_read_by(cache) == [node]:
            node.target = aten.index_copy_.default
    return written


def _is_cache(node: fx.Node) -> bool:
    return node.op == "placeholder" and is_past(str(node.target))


def _values_read_by(node: fx.Node) -> list[fx.Node]:
    """Return the readers of a node's values, as opposed to its sizes."""
    return [user for user in node.users if user.target is not aten.sym_size.int]
