"""Remove adaptations from a graph after they have been folded into base tensors."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

import torch
from torch import fx

from graftc.passes.core.build.effective_weight import NO_BIAS
from graftc.passes.core.ir.cleaning import remove_dead
from graftc.passes.core.ir.edits import Edit, Edits
from graftc.passes.core.ir.new_nodes import insert_call
from graftc.passes.core.ir.program import Program, follow, provenance

aten = torch.ops.aten


def take_out(program: Program, adaptations: Collection[str], additions: Collection[str] = ()) -> Program:
    """Return a new Program without the nodes of ``adaptations``: every replacement that they made is undone.

    The result reads the base's own tensors, so it computes the adapted function with a Store of folded tensors.

    Args:
        program: the Program, which is not changed.
        adaptations: names of the adaptations to remove.
        additions: names of biases added by folding, which maps must not read.
    """
    result = program.copy(tensor_edits=program.tensor_edits.without(adaptations))
    kept: list[Edit] = []
    stands_for: dict[fx.Node, fx.Node] = {}
    for edit in reversed(result.edits):
        if edit.adaptation in adaptations:
            before = follow(edit.before, stands_for)
            edit.after.replace_all_uses_with(before)
            stands_for[edit.after] = before
        else:
            kept.append(edit)
    result.edits = Edits(replace(e, before=follow(e.before, stands_for)) for e in reversed(kept))
    if additions:
        _leave_biases_out(result, set(additions))
    remove_dead(result)
    return result


def folded(program: Program, adaptations: Collection[str], additions: Collection[str]) -> Program:
    """Return a new Program without the folded adaptations, in which maps read the biases that folding has added.

    Args:
        program: a Program in eval mode, which is not changed.
        adaptations: names of the adaptations that have folded.
        additions: names of the biases.
    """
    result = take_out(program, adaptations)
    graph, wanted = result.graph, set(additions)
    for node in list(graph.nodes) if wanted else ():
        name = added_bias(node) if node.op == "call_function" else ""
        if name not in wanted:
            continue
        inserted = provenance(node)
        looks = inserted is not None and inserted["part"] == NO_BIAS
        maps = inserted is None and node.target is aten.linear.default and len(node.args) == 2
        if not (looks or maps):
            continue
        with graph.inserting_before(node):
            bias = graph.get_attr(name)
        value = node.meta["val"]
        bias.meta = {"val": value.new_empty(value.shape[-1]), "module": node.meta["module"]}
        if looks:  # an adaptation above reads a map's bias
            node.replace_all_uses_with(insert_call(node, aten.to.dtype, (bias, value.dtype), node.meta))
        else:
            node.args = (*node.args, bias)
    return result


def added_bias(node: fx.Node) -> str:
    """Return the name of the bias that folding adds to a map without one."""
    return f"{node.meta['module']}.bias".lstrip(".")


def _leave_biases_out(program: Program, additions: Collection[str]) -> None:
    for node in list(program.graph.find_nodes(op="call_function", target=aten.linear.default)):
        bias = node.args[2] if len(node.args) > 2 else None
        if isinstance(bias, fx.Node) and bias.target in additions:
            node.args = node.args[:2]
