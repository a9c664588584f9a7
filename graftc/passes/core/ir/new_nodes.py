"""New nodes of a graph, without what `torch.fx` looks into for each: whole graphs are copied many times.

`fx.Graph.create_node` flattens all arguments in search of symbolic sizes, which ours have as nodes. So a node is made
without arguments, and they are set afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import fx

_ARGS: Any = fx.Node.args
_KWARGS: Any = fx.Node.kwargs


def create_node(
    graph: fx.Graph,
    op: str,
    target: Any,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    name: str | None = None,
) -> fx.Node:
    """A new node at the graph's place of insertion: see `fx.Graph.create_node`."""
    node = graph.create_node(op, target, (), None, name)
    if args:
        _ARGS.fset(node, args)
    if kwargs:
        _KWARGS.fset(node, kwargs)
    return node


def copy_node(graph: fx.Graph, node: fx.Node, value: Callable[[fx.Node], Any], name: str | None = None) -> fx.Node:
    """A node of another graph, or of another place in this one, without its metadata.

    Args:
        graph: takes the copy.
        node: what is copied.
        value: what its arguments are there.
        name: of the copy; that of the node by default.
    """
    args, kwargs = fx.node.map_arg(node.args, value), node.kwargs and fx.node.map_arg(node.kwargs, value)
    made: Any = args
    return create_node(graph, node.op, node.target, made, kwargs, node.name if name is None else name)
