"""Cut a Program at the losses of individual tokens, for objectives that compare log-probabilities."""

from __future__ import annotations

from torch import fx

from graftc.passes.core.ir.cleaning import remove_dead
from graftc.passes.core.ir.edits import Edits
from graftc.passes.core.ir.inference import Inference
from graftc.passes.core.ir.program import OutputSpec, Program
from graftc.passes.core.ops.head_loss import NONE
from graftc.passes.lowering.chunk_losses import chunk_losses
from graftc.passes.lowering.head import loss_of
from graftc.specs.errors.diagnostics import GraftError


def token_losses(program: Program, *, scores: bool = False) -> Program:
    """Return the Program up to its cross-entropy without a reduction, ``[rows]``; rows without a label are zero.

    Head and loss are computed a few rows at a time if possible.

    Args:
        program: a Program with labels among its inputs.
        scores: whether to add the scores of `graftc.passes.core.ops.head_loss.head_scores` as an output, if possible.

    Raises:
        GraftError: GC031 if there is no cross-entropy of tokens, or more than one.
    """
    copy = program.copy(outputs=OutputSpec("leaf"), entry="scores" if scores else "losses", edits=Edits(), baseline={})
    losses = [
        node
        for node in copy.graph.nodes
        if (cross_entropy := loss_of(node)) is not None and _of_tokens(cross_entropy.labels)
    ]
    if len(losses) != 1:
        message = f"the model's outputs have {len(losses)} losses over tokens, but one is needed"
        raise GraftError("GC031", message, hint="call a language model with labels")
    (loss,) = losses
    weight = loss.args[2] if len(loss.args) > 2 else loss.kwargs.get("weight")
    loss.args = (*loss.args[:2], weight, NONE, *loss.args[4:])
    loss.kwargs = {name: value for name, value in loss.kwargs.items() if name not in ("weight", "reduction")}
    loss.meta["val"] = Inference(copy).call(loss.target, loss.args, loss.kwargs)
    copy.output_node.args = ((loss,),)
    remove_dead(copy)
    chunk_losses(copy, scores=scores)
    return copy


def _of_tokens(labels: fx.Node) -> bool:
    value = labels.meta["val"]
    return value.dim() == 1 and not value.is_floating_point()
