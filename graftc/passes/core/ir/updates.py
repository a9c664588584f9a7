"""Which tensors of the Store a graph writes to: running statistics, counters, moving averages, vectors of power
iterations."""

from __future__ import annotations

import torch
from torch import fx

from graftc.passes.core.ir.effects import updated
from graftc.passes.core.ir.program import Program

aten = torch.ops.aten


def updates(graph: fx.Graph) -> frozenset[str]:
    """Names of the tensors that a graph writes to."""
    return frozenset(updated(graph))


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
