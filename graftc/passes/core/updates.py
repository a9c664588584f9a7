"""Which tensors of the Store a graph writes to: running statistics, counters, moving averages, vectors of power
iterations."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from graftc.passes.core.program import Program

aten = torch.ops.aten
_STATISTICS = {
    aten.batch_norm.default: ((3, 4), 5),
    aten.instance_norm.default: ((3, 4), 5),
    aten.native_batch_norm.default: ((3, 4), 5),
    aten.cudnn_batch_norm.default: ((3, 4), 5),
    aten.miopen_batch_norm.default: ((3, 4), 5),
}
"""Operators that write to arguments without saying so: which, and the argument by which they do."""


def updates(graph: fx.Graph) -> frozenset[str]:
    """Names of the tensors that a graph writes to."""
    found = set()
    for node in graph.nodes:
        for written in _written(node):
            owner = _owner(written)
            if owner.op == "get_attr":
                found.add(str(owner.target))
    return frozenset(found)


def _written(node: fx.Node) -> list[fx.Node]:
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return []
    if target in _STATISTICS:
        places, by = _STATISTICS[target]
        found: list[Any] = [node.args[i] for i in places] if node.args[by] is True else []
    else:
        arguments = target._schema.arguments
        found = [
            node.args[i] if i < len(node.args) else node.kwargs.get(argument.name)
            for i, argument in enumerate(arguments)
            if argument.alias_info is not None and argument.alias_info.is_write
        ]
    return [value for value in found if isinstance(value, fx.Node)]


def _owner(node: fx.Node) -> fx.Node:
    """The value that a view, or the result of a call that writes in place, shares memory with."""
    while node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload):
        arguments = node.target._schema.arguments
        shared = next((i for i, a in enumerate(arguments) if a.alias_info is not None), None)
        if shared is None:
            return node
        source = node.args[shared] if shared < len(node.args) else node.kwargs.get(arguments[shared].name)
        if not isinstance(source, fx.Node):
            return node
        node = source
    return node


def as_source(program: Program, names: dict[str, str]) -> Program:
    """A Program that reads some tensors under other names and writes to copies of them alone.

    Args:
        program: stays as it is.
        names: of tensors, to the names that are read in their place.
    """
    found = program.copy(updates=frozenset())
    graph = found.graph
    for node in list(graph.nodes):
        if node.op != "get_attr" or str(node.target) not in names:
            continue
        node.target = names[str(node.target)]
        with graph.inserting_after(node):
            copied = graph.call_function(aten.clone.default, (node,))
        copied.meta = dict(node.meta)
        node.replace_all_uses_with(copied, delete_user_cb=lambda user, copied=copied: user is not copied)
    return found
