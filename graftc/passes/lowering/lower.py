"""The passes that rewrite a copy of a training Program before it becomes code, in order."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import ClassVar

from graftc.passes.core.added_passes import extended
from graftc.passes.core.ir.program import Program
from graftc.passes.core.pass_context import Findings, PassHost
from graftc.passes.core.pipeline import COPIED, Log, Pass, Pipeline
from graftc.passes.lowering.chunk_losses import STEP, chunk_losses
from graftc.passes.lowering.head import LossHead
from graftc.passes.lowering.kept_memory import small_logits
from graftc.passes.lowering.projections import fuse_projections
from graftc.records.graphs import LoweringOutcome
from graftc.specs.document import Spec


@dataclass
class LoweringContext(PassHost):
    """The context of the lowering passes, with their outcomes. A Program has been verified before it is lowered.

    Attributes:
        spec: the spec of the model.
        objectives: names of adaptations that compare the outputs of several passes.
        outcomes: the outcome at each place.
        findings: the findings of plugins' passes.
    """

    keeps_figures: ClassVar[bool] = False

    spec: Spec
    objectives: Collection[str] = ()
    outcomes: list[LoweringOutcome] = field(default_factory=list)
    findings: Findings = field(default_factory=Findings)

    @property
    def requested_spec(self) -> Spec:
        """The spec of the model."""
        return self.spec


def _loss(program: Program, context: LoweringContext) -> None:
    spec = context.spec

    def wanted(program: Program, head: LossHead) -> str:
        if context.objectives:
            return f"{next(iter(context.objectives))!r} compares the outputs of several passes"
        automatic = spec.memory.loss == "auto"
        return small_logits(program, head, checkpointed=spec.checkpoint == "layers") if automatic else ""

    context.outcomes += chunk_losses(program, wanted=wanted)


def _projections(program: Program, context: LoweringContext) -> None:
    context.outcomes += fuse_projections(program)


def _name(step: str) -> str:
    return f"lower({step})"


LOWER: Pipeline[LoweringContext] = Pipeline(
    "lower",
    [
        Pass(_name(STEP), _loss, wanted=lambda program, context: context.spec.memory.loss != "whole"),
        Pass(_name("projections"), _projections),
    ],
    given={COPIED, "adapted"},
)
"""From an adapted training Program to the Program that is run."""


def lower(program: Program, spec: Spec, objectives: Collection[str] = ()) -> tuple[Program, list[LoweringOutcome]]:
    """Return a lowered copy of a training Program, and the outcomes of the passes.

    Args:
        program: the Program, which is not changed.
        spec: the spec of the model, which determines the passes that are skipped.
        objectives: names of adaptations that compare the outputs of several passes.
    """
    context, lowered = LoweringContext(spec, objectives), program.copy()
    wanted = extended(LOWER).without([_name(step) for step in spec.optimise.off])
    return wanted.run(lowered, context, Log(lowered.history)), context.outcomes
