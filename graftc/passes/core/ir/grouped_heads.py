"""Grouped-query attention over a cache without copies of the shared keys and values.

A model repeats keys and values for every head that reads them, since some devices' kernels require this if there is a
mask. The CPU kernel does not, so a decoding step need not copy the whole past in every layer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

aten = torch.ops.aten
_ATTENTION = aten.scaled_dot_product_attention.default
_HEADS = 1
"""The head axis, after the batch axis."""


def share_heads(graph: fx.Graph) -> None:
    """Make attention read cached keys and values directly instead of copies repeated for each head.

    The graph is changed in place; on a CPU, the results are bit-identical.

    Args:
        graph: a graph from which code is generated, not the graph of a Program.
    """
    for node in graph.find_nodes(op="call_function", target=_ATTENTION):
        if node.kwargs.get("enable_gqa") or len(node.args) < 3:
            continue
        query, key, value, *rest = node.args
        keys, values = _repeated(key), _repeated(value)
        if keys is None or values is None or keys[1] != values[1] or not _is_cached(keys[0]):
            continue
        node.args = (query, keys[0], values[0], *rest)
        node.kwargs = {**node.kwargs, "enable_gqa": True}
        for chain in {key: None, value: None}:
            _erase(graph, chain)


def _repeated(node: Any) -> tuple[fx.Node, int] | None:
    """Return the node whose heads are repeated and the number of repetitions, or None if no heads are repeated."""
    merged = _call(node, aten.reshape.default, aten.view.default)
    expanded = _call(merged and merged.args[0], aten.expand.default)
    spread = _call(expanded and expanded.args[0], aten.unsqueeze.default)
    if merged is None or expanded is None or spread is None or spread.args[1] != _HEADS + 1:
        return None
    to: Any = expanded.args[1]
    shape: Any = merged.args[1]
    if len(to) != 5 or len(shape) != 4:
        return None
    heads, times = to[_HEADS], to[_HEADS + 1]
    whole = isinstance(heads, int) and isinstance(times, int) and heads > 0 and shape[_HEADS] == heads * times
    return (spread.args[0], times) if whole and isinstance(spread.args[0], fx.Node) else None


def _is_cached(keys: fx.Node) -> bool:
    """Return whether keys consist of cached keys followed by new ones."""
    joined = _call(keys, aten.cat.default)
    return joined is not None and any(source.op == "placeholder" for source in joined.all_input_nodes)


def _call(node: Any, *targets: Any) -> fx.Node | None:
    return node if isinstance(node, fx.Node) and node.op == "call_function" and node.target in targets else None


def _erase(graph: fx.Graph, node: fx.Node) -> None:
    """Erase a node without readers, and the nodes read only by it."""
    while not node.users and node.op == "call_function":
        source: Any = node.args[0]
        graph.erase_node(node)
        node = source
