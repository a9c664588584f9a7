"""The step of lowering that `memory: {loss: ...}` of a spec asks for."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import partial

from graftc.passes.core.ir.program import Program
from graftc.passes.lowering.chunk_losses import STEP, chunk_losses
from graftc.passes.lowering.head import LossHead
from graftc.passes.lowering.kept import small_logits
from graftc.passes.lowering.lower import Lowering, LoweringOutcome
from graftc.specs.document import Spec
from graftc.specs.errors.diagnostics import warn


def loss_step(spec: Spec, objectives: Collection[str] = ()) -> Mapping[str, Lowering]:
    """The step by its name; nothing where losses are to be computed as a whole.

    Args:
        spec: of the model.
        objectives: names of adaptations that compare the outputs of several passes, which they read.
    """
    how = spec.memory.loss
    if how == "whole":
        return {}

    def wanted(program: Program, head: LossHead) -> str:
        if objectives:
            return f"{next(iter(objectives))!r} compares the outputs of several passes"
        return small_logits(program, head, checkpointed=spec.checkpoint == "layers") if how == "auto" else ""

    return {STEP: partial(chunk_losses, wanted=wanted)}


def warn_of_whole(spec: Spec, program: Program, outcomes: list[LoweringOutcome]) -> None:
    """GC151 where a spec asks for a chunked loss, and a graph that has a loss computes it as a whole."""
    own = [outcome for outcome in outcomes if outcome.step == STEP]
    scalars = [leaf for leaf in program.output_node.all_input_nodes if not leaf.meta["val"].dim()]
    if spec.memory.loss != "chunked" or not scalars or any(outcome.done for outcome in own):
        return
    reasons = [f"{outcome.place}: {outcome.reason}" for outcome in own] or ["it is not a cross-entropy"]
    warn("GC151", f"the loss is computed as a whole: {'; '.join(reasons)}", hint="leave out memory: {loss: chunked}")
