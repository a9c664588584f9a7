"""Build eval-mode Programs: derived from those of train mode, or captured if eval mode cannot be derived."""

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
    """An adapted Program while its eval-mode Program is being built.

    Attributes:
        adapting: the context in which the Program was adapted.
        adapted: the adapted Program in train mode, or one captured in eval mode.
        derived: whether the base's train-mode operations must also be removed.
        base: the base in eval mode, the baseline of the result.
        findings: the findings of plugins' passes.
    """

    adapting: Adapting
    adapted: Program
    derived: bool
    base: Program
    findings: Findings = field(default_factory=Findings)

    @property
    def store(self) -> Store:
        """The Store with every tensor."""
        return self.adapting.store

    @property
    def requested_spec(self) -> Spec:
        """The user's spec."""
        return self.adapting.requested_spec

    def inserting(self, program: Program, owner: str) -> Builder:
        """Return a builder that inserts nodes owned by ``owner``."""
        return self.adapting.builder(program, owner, owner)


def _evaluate(program: Program, context: Evaluating) -> Program:
    result = to_eval(context.adapted, base=context.derived)
    result.baseline = context.base.baseline
    return result


EVALUATE = Pass("mode(eval)", _evaluate, {"adapted"}, {"evaluated", COPIED}, verified=True, typed=True)
"""Remove operations that run only in train mode, above all dropout."""
