"""Compute an output, such as a decoder's logits, for each row's last token only: all that a generation loop reads."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx

from graftc.passes.core.ir.inference import Inference
from graftc.passes.core.ir.program import Program
from graftc.passes.graph.gather_early import first_axes, gather_early

aten = torch.ops.aten
_END = 2**63 - 1


def at_last_tokens(program: Program, output: str, tokens: str, mask: str | None) -> Program:
    """Return a Program in which an output has one position: that of each row's last token.

    Args:
        program: the Program, which is not changed. It is returned itself if the output does not have one position for
            each of the call's tokens.
        output: the name of the output, ``[batch, tokens, width]``; in the new Program, ``[batch, 1, width]``.
        tokens: the name of the input whose first two axes are those of the call's tokens.
        mask: the name of the input, ``[batch, past + tokens]``, that is 0 at padding, which may be in front of a text
            or behind it; None if the last token is in the last column of every row.
    """
    changed = program.copy()
    leaves: Any = changed.graph.output_node().args[0]
    inputs = {str(node.target): node for node in changed.placeholders()}
    logits, ids = dict(zip(changed.outputs.names, leaves, strict=True)).get(output), inputs.get(tokens)
    if logits is None or ids is None or not _for_each_token(logits, ids):
        return program
    graph, types = changed.graph, Inference(changed)

    def call(target: Any, *args: Any) -> fx.Node:
        node = graph.call_function(target, args)
        node.meta = {"val": types.call(target, args, {}), "module": ""}
        return node

    with graph.inserting_before(list(inputs.values())[-1].next):
        count = call(aten.sym_size.int, ids, 1)
        numbers = call(aten.unsqueeze.default, call(aten.arange.default, count), 0)
        if mask is not None and mask in inputs:
            own = call(aten.slice.Tensor, inputs[mask], 1, call(operator.neg, count), _END)
            numbers = call(aten.where.ScalarOther, call(aten.ne.Scalar, own, 0), numbers, 0)
        else:
            numbers = call(aten.expand.default, numbers, [call(aten.sym_size.int, ids, 0), -1])
        places = call(aten.amax.default, numbers, [1], True)
    with graph.inserting_before(graph.output_node()):
        column = call(aten.unsqueeze.default, places, -1)
        index = call(aten.expand.default, column, [-1, -1, logits.meta["val"].shape[2]])
        last = call(aten.gather.default, logits, 1, index)
    graph.output_node().args = ([last if leaf is logits else leaf for leaf in leaves],)
    gather_early(changed)
    changed.edits = changed.edits.within(set(graph.nodes))
    return changed


def _for_each_token(value: Any, ids: fx.Node) -> bool:
    """Return whether a value has three axes, of which the first two are those of token ids."""
    result = value.meta.get("val") if isinstance(value, fx.Node) else None
    return isinstance(result, Tensor) and result.dim() == 3 and first_axes(result) == first_axes(ids.meta["val"])
