"""Properties of graph nodes for which torch has no public name."""

from __future__ import annotations

from torch import fx

OUTSIDE_MODULES = "_empty_nn_module_stack"
"""The prefix of the path that torch.export assigns to nodes outside any module's call."""


def is_erased(node: fx.Node) -> bool:
    """Return whether a node has been erased from its graph, without searching the graph for it."""
    return node._erased
