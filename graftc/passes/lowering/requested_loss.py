"""Compare the loss that a spec requests through `memory: {loss: ...}` with the outcome."""

from __future__ import annotations

from torch import Tensor

from graftc.passes.core.ir.program import Program
from graftc.passes.lowering.chunk_losses import STEP
from graftc.records.graphs import LoweringOutcome
from graftc.specs.document import Spec
from graftc.specs.errors.diagnostics import warn


def warn_of_whole(spec: Spec, program: Program, outcomes: list[LoweringOutcome]) -> None:
    """Warn (GC151) if a spec requests a chunked loss but a graph with a loss computes it as a whole."""
    own = [outcome for outcome in outcomes if outcome.step == STEP]
    values = [leaf.meta["val"] for leaf in program.output_node.all_input_nodes]
    scalars = [value for value in values if isinstance(value, Tensor) and not value.dim()]
    if spec.memory.loss != "chunked" or not scalars or any(outcome.done for outcome in own):
        return
    reasons = [f"{outcome.place}: {outcome.reason}" for outcome in own] or ["it is not a cross-entropy"]
    warn("GC151", f"the loss is computed as a whole: {'; '.join(reasons)}", hint="remove memory: {loss: chunked}")
