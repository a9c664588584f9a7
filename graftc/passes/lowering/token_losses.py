"""A Program as far as the losses of single tokens: what objectives read that compare log-probabilities."""

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
    """The Program as far as its cross-entropy without a reduction, ``[rows]``: zero where there is no label. Head and
    loss are computed a few rows at a time where that is possible.

    Args:
        program: one that takes labels.
        scores: what `graftc.passes.core.ops.head_loss.head_scores` gives is another output, where it is possible.

    Raises:
        GraftError: GC031 where there is no cross-entropy of tokens, or more than one.
    """
    made = program.copy(outputs=OutputSpec("leaf"), entry="scores" if scores else "losses", edits=Edits(), baseline={})
    losses = [node for node in made.graph.nodes if (found := loss_of(node)) is not None and _of_tokens(found.labels)]
    if len(losses) != 1:
        message = f"the model's outputs have {len(losses)} losses over tokens, and one is needed"
        raise GraftError("GC031", message, hint="call a language model, with labels")
    (loss,) = losses
    weight = loss.args[2] if len(loss.args) > 2 else loss.kwargs.get("weight")
    loss.args = (*loss.args[:2], weight, NONE, *loss.args[4:])
    loss.kwargs = {name: value for name, value in loss.kwargs.items() if name not in ("weight", "reduction")}
    loss.meta["val"] = Inference(made).call(loss.target, loss.args, loss.kwargs)
    made.output_node.args = ((loss,),)
    remove_dead(made)
    chunk_losses(made, scores=scores)
    return made


def _of_tokens(labels: fx.Node) -> bool:
    value = labels.meta["val"]
    return value.dim() == 1 and not value.is_floating_point()
