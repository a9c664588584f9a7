"""Determine which adaptations of a Compilation fold, and why the others do not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from graftc.compiler.compilation import Compilation
from graftc.compiler.folding.steps import OwnSteps, in_order, own_steps
from graftc.compiler.resolve.resolver import Resolved
from graftc.compiler.resolve.tokens import TOKENS
from graftc.compiler.resolve.train import TRAIN
from graftc.passes.core.method.registry import method_for
from graftc.passes.core.sites.sites import LinearSite, SiteKey
from graftc.passes.core.weights.folds import LazyTensors
from graftc.specs.errors.diagnostics import GraftError, unknown_name


@dataclass(frozen=True)
class FoldPlan:
    """The adaptations that fold, and those that stay.

    Attributes:
        lazy: the folded tensors.
        names: names of the adaptations that fold, in insertion order, including ``tokens`` and ``trained``.
        kept: the other adaptations, each with the error that explains why it stays.
    """

    lazy: LazyTensors
    names: tuple[str, ...]
    kept: Mapping[str, GraftError]

    def reasons(self) -> dict[str, str]:
        """Return the reason why each other adaptation stays, as a readable message."""
        return {name: error.message for name, error in self.kept.items()}


def fold_plan(compilation: Compilation, only: Sequence[str] | None = None) -> FoldPlan:
    """Try to fold every adaptation, and return the adaptations that fold and those that stay.

    An adaptation that was inserted on top of one that stays must also stay: folding it into the weights would apply it
    first. This does not apply to replacements of base tensors, which come before everything else. Nothing folds in a
    graph that a plugin's pass has rewritten.

    Args:
        compilation: the compilation to fold.
        only: names of the adaptations that must fold, while all others stay; by default, all that can fold do.

    Raises:
        GraftError: with ``only``, GC091 for an unknown name, GC050 and GC022 for an adaptation that does not fold.
    """
    rewritten = _rewritten(compilation)
    units = {unit.name: unit for unit in compilation.units}
    resolved = {name: unit.members[0] for name, unit in units.items()}
    for name in only or ():
        if name not in (TOKENS, TRAIN, *resolved):
            raise unknown_name("adaptation", name, (TOKENS, TRAIN, *resolved))
    names: list[str] = []
    steps: list[OwnSteps] = []
    kept: dict[str, GraftError] = {}
    for name in [TOKENS, TRAIN, *resolved]:
        present, below = _present(compilation, name), _below(resolved, name, kept)
        try:
            if only is not None and name not in only:
                if present:
                    kept[name] = GraftError("GC050", f"{name!r} was not selected for folding")
                continue
            if rewritten is not None and present:
                raise rewritten
            if below is not None:
                chosen = only is None or below[0] in only
                reason = "which does not fold" if chosen else "which stays, and would then apply after it"
                message = f"{name!r} is stacked on {below[0]!r} at {below[1]}, {reason}"
                other = "without it" if chosen else f"{below[0]!r} too"
                raise GraftError("GC050", message, hint=f"fold {other}, or put {name!r} first in the spec")
            own = own_steps(compilation, name)
            if any(own):
                names.append(name)
                steps.append(own)
        except GraftError as error:
            if error.code not in ("GC022", "GC050") or only is not None:
                raise
            kept[name] = error
    lazy = LazyTensors(compilation.store, in_order(steps))
    for unit in units.values():  # the members of a composition fold or stay together with it
        for member in unit.members:
            if unit.name in kept:
                kept.setdefault(member.name, kept[unit.name])
            elif unit.name in names and member.name not in names:
                names.append(member.name)
    return FoldPlan(lazy, tuple(names), kept)


def _rewritten(compilation: Compilation) -> GraftError | None:
    """Return the reason why nothing folds if a plugin's pass has rewritten a graph; None if no pass has.

    Folding removes adaptations from a graph, and the result must be the base's graph.
    """
    edits = [compilation.program(mode).edits for mode in ("train", "eval")]
    for own in compilation.main.passes:
        if own.rewrites and any(edit.adaptation == own.name for each in edits for edit in each):
            message = f"{own} has rewritten the graph, which weights cannot represent"
            return GraftError("GC050", message, hint=f"compile in an environment without {own.distribution}")
    return None


def _present(compilation: Compilation, name: str) -> bool:
    """Return whether anything was inserted for an adaptation; a spec's ``tokens`` and ``train`` may be unset."""
    return name in compilation.unit_of or bool(compilation.tensor_edits.copies(name))


def _below(resolved: Mapping[str, Resolved], name: str, kept: Mapping[str, GraftError]) -> tuple[str, SiteKey] | None:
    """Return an adaptation that stays and a place where ``name`` adapts overlapping rows; None if there is none."""
    if name not in resolved or method_for(resolved[name].spec.method).stands_in:
        return None
    mine = [site for site, _ in resolved[name].places if isinstance(site, LinearSite)]
    for other in filter(resolved.__contains__, kept):
        for site, _ in resolved[other].places:
            for own in mine:
                same = (own.key.module, own.key.name) == (site.key.module, site.key.name)
                if same and isinstance(site, LinearSite) and own.own.overlaps(site.own):
                    return other, own.key
    return None
