"""The Programs of eval mode: derived from those of train mode, or captured where eval mode is more than that."""

from __future__ import annotations

from dataclasses import dataclass, field

from graftc.compiler.adapt.context import Adapting
from graftc.passes.core.build.builder import Builder
from graftc.passes.core.ir.eval_mode import to_eval
from graftc.passes.core.ir.program import Program
from graftc.passes.core.pass_context import Findings, PassHost
from graftc.passes.core.pipeline import COPIED, Pass
from graftc.passes.core.weights.store import Store
from graftc.specs.document import Spec


@dataclass
class Evaluating(PassHost):
    """An adapted Program of which that of eval mode is made.

    Attributes:
        adapting: what the adapted Program came from.
        adapted: the adapted Program in train mode, or one captured in eval mode.
        derived: whether what the base does in train mode alone has to be taken out of it too.
        base: the base in eval mode, which the result is held against.
        findings: what passes of plugins leave.
    """

    adapting: Adapting
    adapted: Program
    derived: bool
    base: Program
    findings: Findings = field(default_factory=Findings)

    @property
    def store(self) -> Store:
        """Every tensor."""
        return self.adapting.store

    @property
    def asked(self) -> Spec:
        """See `PassHost`."""
        return self.adapting.asked

    def inserting(self, program: Program, owner: str) -> Builder:
        """See `PassHost`."""
        return self.adapting.builder(program, owner, owner)


def _evaluate(program: Program, context: Evaluating) -> Program:
    result = to_eval(context.adapted, base=context.derived)
    result.baseline = context.base.baseline
    return result


EVALUATE = Pass("mode(eval)", _evaluate, {"adapted"}, {"evaluated", COPIED}, verified=True, typed=True)
"""Take out what happens in train mode alone, dropout above all."""
