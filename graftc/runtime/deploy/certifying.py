"""Certify a merge: gather evidence for the fold at every site, and compare outputs and graphs."""

from __future__ import annotations

import math
from dataclasses import dataclass

from graftc.compiler.folding.certificate import DEFAULT_BUDGET
from graftc.compiler.folding.certify import Advance, Folded
from graftc.compiler.folding.collapse import collapse_evidence
from graftc.compiler.folding.requantise import BaseForm, Repacked
from graftc.compiler.folding.steps import recasting
from graftc.passes.core.ir.printer import structural_hash
from graftc.passes.graph.remove_folded import take_out
from graftc.records.certificate import Certificate
from graftc.runtime.deploy.comparing import compared
from graftc.runtime.deploy.folded_runner import FoldedRunner
from graftc.runtime.deploy.rounding_noise import rounding_noise
from graftc.runtime.model.adapted import AdaptedRunner
from graftc.specs.errors.diagnostics import warn

_LARGE_SHARE = 0.1
"""A budget larger than this share of the outputs themselves proves little."""


@dataclass(frozen=True)
class FoldRequest:
    """The options of a fold.

    Attributes:
        budget: the budget, as for `Compiled.merge`.
        base: the form of packed weights in the result, see `Compiled.merge`. By default, weights that change are in
            full precision and the others stay packed, as a certificate requires.
        advance: a callback that receives the completed fraction of the folding, from 0 to 1.
        origin: the model from which this one was widened, whose base the certificate names.
    """

    budget: float | None = None
    base: BaseForm | None = None
    advance: Advance = lambda _: None
    origin: AdaptedRunner | None = None

    def chosen(self, runner: AdaptedRunner) -> float | None:
        """Return the budget that the call or the spec sets; None if neither does."""
        return self.budget if self.budget is not None else runner.compilation.spec.fold.budget.logits


def certify(
    runner: AdaptedRunner,
    merged: FoldedRunner,
    folded: Folded,
    repacked: Repacked,
    request: FoldRequest,
) -> Certificate:
    """Return a fold's certificate, whether or not it passes.

    Args:
        runner: the Runner of the adapted model.
        merged: the Runner of the folded model.
        folded, repacked: the results of folding and of repacking weights.
        request: the options of the fold.
    """
    compilation, additions = runner.compilation, merged.additions
    base, origin = compilation.program("eval", "base"), request.origin or runner
    chosen = request.chosen(runner)
    comparison = compared(runner, merged, chosen or 0.0, repacked.budget)
    budget = chosen
    if budget is None:
        budget = max(DEFAULT_BUDGET.get(runner.dtype, 1e-4), repacked.budget) * max(1.0, comparison.largest)
    worst = max(comparison.differences.values(), default=0.0)
    # A deep model in 16 bits, or one that continues from its own outputs, amplifies the last bit of its weights.
    doubted = chosen is None and budget < worst < math.inf
    notes: tuple[str, ...] = ()
    if doubted or not comparison.explained:
        weights = {name: merged.store.get(name) for name in merged.changed}
        weights = {name: weight for name, weight in weights.items() if weight.is_floating_point()}

        def enough(noise: float) -> bool:
            return (not doubted or 2 * noise >= worst) and comparison.explained

        with comparison.repeating() as run:
            noise = rounding_noise(weights, recasting(compilation, merged.folded), run, comparison.after, enough)
        if doubted and 2 * noise > budget:
            notes = (f"the budget is twice the effect of rounding the folded weights differently, not {budget:.1e}",)
            budget = 2 * noise
            if budget > _LARGE_SHARE * comparison.largest:
                message = (
                    f"rounding the folded weights differently changes outputs by {noise:.1e}, of at most "
                    f"{comparison.largest:.1e}: their comparison proves little, and the weights' own must do"
                )
                warn("GC169", message)
    outputs = comparison.differences
    if chosen is None:
        outputs, more = comparison.within(budget)
        notes += more
    if repacked.packed:
        count = f"{len(repacked.packed)} weights" if len(repacked.packed) > 1 else "1 weight"
        notes += (f"the fold is not exact: {count} that it changes were packed again",)
    elif compilation.store.packed:
        notes += ("the base's weights are packed; folded weights are in full precision",)
    if origin is not runner:
        notes += (f"the base is in {str(origin.dtype).removeprefix('torch.')}",)
    program = merged.program_of(compilation.key("eval"))
    bare = take_out(program, merged.kept, additions)  # without unfolded adaptations and added biases
    return Certificate(
        sites=folded.sites,
        outputs=outputs,
        budget=budget,
        routes=comparison.routes,
        structure=structural_hash(bare, compilation.store.canonical),
        base_structure=structural_hash(base, compilation.store.canonical),
        additions=additions,
        fingerprint=origin.compilation.identity().fingerprint,
        dtype=str(runner.dtype).removeprefix("torch."),
        collapses=collapse_evidence(compilation),
        anchors=tuple(anchor.record for anchor in compilation.main.anchors),
        retention=folded.retention,
        notes=notes,
        requantised=repacked.evidence,
    )
