"""Put new keys and values into a cache of fixed length: in place if an eval graph may, otherwise into a copy."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from graftc.passes.core.ir.past_inputs import SEEN, is_past
from graftc.passes.core.ir.program import Program

aten = torch.ops.aten


def write_caches(program: Program, *, in_place: bool) -> Program:
    """Return a Program that puts keys and values of any dtype into its cache, such as autocasting results in.

    Args:
        program: a Program; it is returned itself if it has no cache of fixed length.
        in_place: whether to write to cache tensors, as in eval mode, if nothing else reads them. The graph's outputs
            are the same, and the tensors that it returns for the cache are those that were passed in.
    """
    if SEEN not in program.signature:
        return program
    lowered = program.copy()
    for node in lowered.graph.find_nodes(op="call_function", target=aten.index_copy.default):
        cache = node.args[0]
        if isinstance(cache, fx.Node) and cache.op == "placeholder" and is_past(str(cache.target)):
            node.target = written if in_place and _values_read_by(cache) == [node] else extended
    return lowered


def written(cache: Tensor, axis: int, places: Tensor, new: Tensor) -> Tensor:
    """Write keys or values into a cache at some places along an axis, and return the cache."""
    return cache.index_copy_(axis, places, new.to(cache.dtype))


def extended(cache: Tensor, axis: int, places: Tensor, new: Tensor) -> Tensor:
    """Return a copy of a cache with keys or values at some places along an axis."""
    return cache.index_copy(axis, places, new.to(cache.dtype))


def _values_read_by(node: fx.Node) -> list[fx.Node]:
    """Return the readers of a node's values, as opposed to its sizes."""
    return [user for user in node.users if user.target is not aten.sym_size.int]
