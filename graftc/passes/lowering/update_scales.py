"""Let the sum that adds a low-rank update multiply it by its scale, which saves an operator for every site.

``y + (s * A x) B`` becomes ``y + s * (A x) B``, computed by one operator. Both round to within the dtype's precision.
Scales below 1 stay where they are, since ``(A x) B`` is then larger than what is added, which float16 may have no room
for.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from graftc.passes.core.ir.program import Program

aten = torch.ops.aten
_MOST = 2**15
"""A scale that every dtype can represent."""


def scale_in_sums(program: Program) -> Program:
    """Return a Program whose sums scale the updates that they add, or the given one if it has no such updates.

    Args:
        program: a Program in eval mode. Only scales from 1 to 2**15 move; those that are tensors stay where they are.
    """
    if not any(map(_scaled, program.graph.nodes)):
        return program
    lowered = program.copy()
    for node in list(lowered.graph.nodes):
        if (update := _scaled(node)) is None:
            continue
        product = update.args[0]
        assert isinstance(product, fx.Node)
        hidden, scale = product.args
        value = next(other for other in node.all_input_nodes if other is not update)
        update.args = (hidden, *update.args[1:])
        node.args, node.kwargs = (value, update), {"alpha": scale}
        lowered.graph.erase_node(product)
    return lowered


def _scaled(node: fx.Node) -> fx.Node | None:
    """Return the update that a sum adds if its hidden values are multiplied by a number; otherwise None."""
    if node.target is not aten.add.Tensor or node.kwargs or len(node.all_input_nodes) != 2:
        return None
    return next(filter(_is_update, node.all_input_nodes), None)


def _is_update(value: Any) -> bool:
    """Return whether a value is a product without a bias of scaled hidden values that nothing else reads."""
    if not (_has_one_reader(value, aten.linear.default) and len(value.args) == 2 and not value.kwargs):
        return False
    product = value.args[0]
    if not _has_one_reader(product, aten.mul.Tensor) or product.kwargs or not isinstance(product.args[0], fx.Node):
        return False
    scale = product.args[1]
    return type(scale) in (int, float) and 1 <= scale <= _MOST and product.meta["val"].is_floating_point()


def _has_one_reader(value: Any, target: Any) -> bool:
    return isinstance(value, fx.Node) and value.target is target and len(value.users) == 1
