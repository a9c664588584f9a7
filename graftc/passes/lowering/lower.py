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
from graftc.passes.lowering.kept import small_logits
from graftc.passes.lowering.outcome import LoweringOutcome
from graftc.passes.lowering.projections import fuse_projections
from graftc.specs.document import Spec


@dataclass
class LoweringContext(PassHost):
    """What the passes know, and what they say of their work. What is lowered was verified before.

    Attributes:
        spec: of the model.
        objectives: names of adaptations that compare the outputs of several passes, which they read.
        outcomes: what became of each place.
        findings: what passes of plugins leave.
    """

    keeps_figures: ClassVar[bool] = False

    spec: Spec
    objectives: Collection[str] = ()
    outcomes: list[LoweringOutcome] = field(default_factory=list)
    findings: Findings = field(default_factory=Findings)

    @property
    def asked(self) -> Spec:
        """See `PassHost`."""
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
"""From an adapted training Program to what is run of it."""


def lower(program: Program, spec: Spec, objectives: Collection[str] = ()) -> tuple[Program, list[LoweringOutcome]]:
    """A copy of a training Program as it is run, and what each pass did to it.

    Args:
        program: stays as it is.
        spec: of the model; says which passes are left out.
        objectives: names of adaptations that compare the outputs of several passes.
    """
    context, lowered = LoweringContext(spec, objectives), program.copy()
    wanted = extended(LOWER).without([_name(step) for step in spec.optimise.off])
    return wanted.run(lowered, context, Log(lowered.history)), context.outcomes
