"""Positions that a model counts by its tokens, as RoBERTa numbers what is not padding, for longer inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import count

import torch
from torch import fx

from graftc.passes.core.build.batch import Call
from graftc.passes.core.ir.program import above, map_nodes

aten = torch.ops.aten


def counted_inputs(numbers: fx.Node) -> list[fx.Node]:
    """The inputs whose values decide on positions, ids of tokens among them; none where sizes and masks alone do, which
    go along with a longer sequence by themselves, or where positions are given."""
    read = {
        source
        for node in above([numbers])
        if node.target is not aten.sym_size.int
        for source in node.all_input_nodes
        if source.op == "placeholder"
    }
    return sorted(read) if any(str(node.target).endswith("input_ids") for node in read) else []


def tokens_in_front(call: Call, numbers: fx.Node, ids: fx.Node, length: int) -> fx.Node:
    """``[batch, length]`` tokens that count as ones, of the type of ``ids: [batch, n]``."""
    ones = call(aten.new_ones.default, ids, [call(aten.sym_size.int, ids, 0), length])
    token = 1 if _is_mask(ids) else _counted_token(numbers)
    return ones if token == 1 else call(aten.mul.Tensor, ones, token)


def recounted(
    numbers: fx.Node, longer: Mapping[fx.Node, fx.Node], call: Call, same: Callable[[fx.Node], fx.Node]
) -> fx.Node:
    """``numbers`` made from other inputs.

    Args:
        numbers: the positions.
        longer: what stands in for inputs.
        call: emits a call.
        same: what stands for a node that none of these inputs is above of.
    """
    made = dict(longer)
    for node in above([numbers]):
        if node in made:
            continue
        if not any(source in made for source in node.all_input_nodes):
            continue
        args, kwargs = map_nodes(
            (node.args, dict(node.kwargs)), lambda source: made[source] if source in made else same(source)
        )
        made[node] = call(node.target, *args, **kwargs)
    return made[numbers]


def _counted_token(numbers: fx.Node) -> int:
    """A token id that no comparison above looks for, as they do for padding."""
    literals = {value for node in above([numbers]) for value in node.args if type(value) is int}
    return next(token for token in count() if token not in literals)


def _is_mask(node: fx.Node) -> bool:
    return str(node.target).endswith("mask")
