"""What torch knows about nodes of graphs without a public name for it."""

from __future__ import annotations

from torch import fx

OUTSIDE_MODULES = "_empty_nn_module_stack"
"""How the path begins that torch.export gives nodes that no module has called."""


def is_erased(node: fx.Node) -> bool:
    """Return whether a node has been erased from its graph, which would otherwise have to be searched for it."""
    return node._erased
