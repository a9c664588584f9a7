"""Create graph nodes without the checks that `torch.fx` makes for each node, since whole graphs are copied many times.

`fx.Graph.create_node` flattens all arguments in search of symbolic sizes, but in these graphs such sizes are nodes.
Nodes are therefore created without arguments, which are set afterwards.
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
    """Create a node at the graph's insertion point; see `fx.Graph.create_node`."""
    node = graph.create_node(op, target, (), None, name)
    if args:
        _ARGS.fset(node, args)
    if kwargs:
        _KWARGS.fset(node, kwargs)
    return node


def insert_call(
    place: fx.Node, target: Any, args: tuple[Any, ...], meta: Mapping[str, Any], *, after: bool = False
) -> fx.Node:
    """Insert a call with the given metadata before a node, or after it."""
    with place.graph.inserting_after(place) if after else place.graph.inserting_before(place):
        node = place.graph.call_function(target, args)
    node.meta = dict(meta)
    return node


def copy_node(graph: fx.Graph, node: fx.Node, value: Callable[[fx.Node], Any], name: str | None = None) -> fx.Node:
    """Copy a node from another graph, or from elsewhere in this one, without its metadata.

    Args:
        graph: the graph to which the copy is added.
        node: the node to copy.
        value: a function that maps the nodes in the original's arguments to the values in the copy's arguments.
        name: the copy's name; by default the node's own.
    """
    args, kwargs = fx.node.map_arg(node.args, value), node.kwargs and fx.node.map_arg(node.kwargs, value)
    copied: Any = args
    return create_node(graph, node.op, node.target, copied, kwargs, node.name if name is None else name)
