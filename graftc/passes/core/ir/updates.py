"""The Store tensors that a graph writes to.

These are running statistics, counters, moving averages and power-iteration vectors.
"""

from __future__ import annotations

import torch
from torch import fx

from graftc.passes.core.ir.effects import updated
from graftc.passes.core.ir.program import Program

aten = torch.ops.aten


def updates(graph: fx.Graph) -> frozenset[str]:
    """Return the names of the tensors that a graph writes to."""
    return frozenset(updated(graph))


def as_source(program: Program, names: dict[str, str]) -> Program:
    """Return a Program that reads some tensors under other names and writes only to copies of them.

    Args:
        program: the original Program, which is not changed.
        names: a mapping from tensor names to the names that are read instead.
    """
    result = program.copy(updates=frozenset())
    graph = result.graph
    for node in list(graph.nodes):
        if node.op != "get_attr" or str(node.target) not in names:
            continue
        node.target = names[str(node.target)]
        with graph.inserting_after(node):
            copied = graph.call_function(aten.clone.default, (node,))
        copied.meta = dict(node.meta)
        node.replace_all_uses_with(copied, delete_user_cb=lambda user, copied=copied: user is not copied)
    return result
