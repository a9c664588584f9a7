"""Fuse a vocabulary head and its loss into one operator, which computes logits a few rows at a time.

Operators that move rows of the logits are applied to the head's inputs instead.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from graftc.passes.core.ir.edits import Edits
from graftc.passes.core.ir.inference import Inference
from graftc.passes.core.ir.new_nodes import insert_call
from graftc.passes.core.ir.program import OutputSpec, Program
from graftc.passes.lowering.dropped_outputs import without
from graftc.passes.lowering.head import VIEWS, LossHead, NoMatchError, Term, loss_of, read_head, width_of
from graftc.records.graphs import LoweringOutcome

aten = torch.ops.aten

STEP = "loss"
"""The name of this step."""


def chunk_losses(
    program: Program, wanted: Callable[[Program, LossHead], str] | None = None, *, scores: bool = False
) -> list[LoweringOutcome]:
    """Rewrite every loss over a vocabulary in place, and remove the logits from the outputs.

    Args:
        program: a Program in train mode.
        wanted: a function that returns why a head must stay unchanged, or an empty string to rewrite it. By default,
            every head is rewritten.
        scores: if true, the loss has no reduction and is the only output; the scores of `head_scores` become a second
            output.
    """
    outcomes = []
    for loss in [node for node in program.graph.nodes if loss_of(node) is not None]:
        head = LossHead(loss)
        try:
            read_head(head)
            if reason := (wanted(program, head) if wanted is not None else ""):
                raise NoMatchError(reason)
            _write(program, head, scores)
            outcomes.append(LoweringOutcome(STEP, head.place, True))
        except NoMatchError as reason:
            place = head.place or str(loss.meta.get("module", "")) or str(loss.name)
            outcomes.append(LoweringOutcome(STEP, place, False, str(reason)))
    return outcomes


def _write(program: Program, head: LossHead, scores: bool) -> None:
    loss = loss_of(head.loss)
    assert loss is not None
    types = Inference(program)
    dtype = head.terms[0].x.meta["val"].dtype

    def call(target: Any, *args: Any) -> fx.Node:
        meta = {**head.loss.meta, "val": types.call(target, args, {}), "module": head.place}
        return insert_call(head.loss, target, args, meta)

    def cast(node: fx.Node) -> fx.Node:
        return node if node.meta["val"].dtype == dtype else call(aten.to.dtype, node, dtype)

    def part(term: Term, node: fx.Node, axis: int) -> fx.Node:
        whole = term.stop - term.start == node.meta["val"].shape[axis]
        return node if whole else call(aten.slice.Tensor, node, axis, term.start, term.stop)

    def moved(term: Term) -> fx.Node:
        x, width = term.x, width_of(term.x)
        for move in reversed(term.moves):
            args: list[Any] = list(move.args[1:])
            if move.target in VIEWS:
                args[0] = [*args[0][:-1], width]
            x = call(aten.reshape.default if move.target in VIEWS else move.target, x, *args)
        return cast(x if term.factor == 1 else call(aten.mul.Tensor, x, term.factor))

    def weight(term: Term, stored: fx.Node) -> fx.Node:
        return cast(part(term, call(aten.t.default, stored) if term.turned else stored, 0))

    def bias(term: Term) -> fx.Node:
        flat = call(aten.reshape.default, term.x, [-1]) if term.x.meta["val"].dim() > 1 else term.x
        own = cast(part(term, flat, 0))
        own = own if term.factor == 1 else call(aten.mul.Tensor, own, term.factor)
        around = [term.to, width_of(loss.logits) - term.end]
        return call(aten.constant_pad_nd.default, own, around) if any(around) else own

    biases = [bias(term) for term in head.biases if term.stop > term.start]
    total = biases[0] if biases else None
    for other in biases[1:]:
        total = call(aten.add.Tensor, total, other)
    xs = [moved(term) for term in head.terms]
    weights = [weight(term, term.weight) for term in head.terms if term.weight is not None]
    given = (xs, weights, total, loss.labels, [term.to for term in head.terms], loss.ignored)
    if scores:
        both = call(torch.ops.graftc.head_scores.default, *given, head.scale, head.cap)
        program.outputs = OutputSpec("tuple", children=(OutputSpec("leaf"), OutputSpec("leaf")))
        program.output_node.args = ((head.loss, call(operator.getitem, both, 1)),)
        after = call(operator.getitem, both, 0)
    else:
        form = (loss.reduction, loss.smoothing, head.scale, head.cap)
        after = call(torch.ops.graftc.head_loss.default, *given, *form)
    if after.meta["val"].dtype != head.loss.meta["val"].dtype:
        after = call(aten.to.dtype, after, head.loss.meta["val"].dtype)
    head.loss.replace_all_uses_with(after)
    _drop(program, head)


def _drop(program: Program, head: LossHead) -> None:
    """Remove logits from the outputs, and the nodes that compute them from the graph."""
    leaves = program.output_node.args[0]
    assert isinstance(leaves, tuple | list)
    gone = {at for at, leaf in enumerate(leaves) if leaf in head.chain}
    program.outputs = without(program.outputs, gone)
    program.output_node.args = (tuple(leaf for at, leaf in enumerate(leaves) if at not in gone),)
    dead = {head.loss, *head.chain}
    program.edits = Edits(e for e in program.edits if e.before not in dead and e.after not in dead)
    for node in sorted(dead, reverse=True):
        program.graph.erase_node(node)
