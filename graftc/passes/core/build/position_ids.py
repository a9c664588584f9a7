"""Recompute, for longer inputs, position ids that a model counts from its tokens (RoBERTa skips padding)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import count

import torch
from torch import fx

from graftc.passes.core.build.batch import Call
from graftc.passes.core.ir.program import above, map_nodes

aten = torch.ops.aten


def counted_inputs(numbers: fx.Node) -> list[fx.Node]:
    """Return the inputs whose values determine the positions, if token ids are among them.

    Otherwise the list is empty: the positions are passed in or depend only on sizes and masks, so no recount is needed.
    """
    read = {
        source
        for node in above([numbers])
        if node.target is not aten.sym_size.int
        for source in node.all_input_nodes
        if source.op == "placeholder"
    }
    return sorted(read) if any(str(node.target).endswith("input_ids") for node in read) else []


def tokens_in_front(call: Call, numbers: fx.Node, ids: fx.Node, length: int) -> fx.Node:
    """Return ``[batch, length]`` tokens that the model counts as positions, in the dtype of ``ids: [batch, n]``."""
    ones = call(aten.new_ones.default, ids, [call(aten.sym_size.int, ids, 0), length])
    token = 1 if _is_mask(ids) else _counted_token(numbers)
    return ones if token == 1 else call(aten.mul.Tensor, ones, token)


def recounted(
    numbers: fx.Node, longer: Mapping[fx.Node, fx.Node], call: Call, same: Callable[[fx.Node], fx.Node]
) -> fx.Node:
    """Recompute ``numbers`` from replaced inputs and return the new node.

    Args:
        numbers: the position ids.
        longer: the replacement for each input.
        call: a function that inserts a call.
        same: a function that returns the replacement for a node that does not depend on these inputs.
    """
    replaced = dict(longer)
    for node in above([numbers]):
        if node not in replaced and any(source in replaced for source in node.all_input_nodes):
            args, kwargs = map_nodes(
                (node.args, dict(node.kwargs)), lambda source: replaced[source] if source in replaced else same(source)
            )
            replaced[node] = call(node.target, *args, **kwargs)
    return replaced[numbers]


def _counted_token(numbers: fx.Node) -> int:
    """Return a token id that, unlike the padding id, is not a literal argument of any call above ``numbers``."""
    literals = {value for node in above([numbers]) for value in node.args if type(value) is int}
    return next(token for token in count() if token not in literals)


def _is_mask(node: fx.Node) -> bool:
    return str(node.target).endswith("mask")
