"""The Programs of eval mode: derived from those of train mode, or captured where eval mode is more than that."""

from __future__ import annotations

from dataclasses import dataclass

from graftc.passes.core.ir.eval_mode import to_eval
from graftc.passes.core.ir.program import Program
from graftc.passes.core.pipeline import Pass
from graftc.passes.core.weights.store import Store


@dataclass
class Evaluating:
    """An adapted Program of which that of eval mode is made.

    Attributes:
        store: every tensor.
        adapted: the adapted Program in train mode, or one captured in eval mode.
        derived: whether what the base does in train mode alone has to be taken out of it too.
        base: the base in eval mode, which the result is held against.
    """

    store: Store
    adapted: Program
    derived: bool
    base: Program


def _evaluate(program: Program, context: Evaluating) -> Program:
    result = to_eval(context.adapted, base=context.derived)
    result.baseline = context.base.baseline
    return result


EVALUATE: Pass[Evaluating] = Pass("mode(eval)", _evaluate, frozenset({"adapted"}), frozenset({"evaluated"}))
"""Take out what happens in train mode alone, dropout above all."""
