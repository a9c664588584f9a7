"""One budget for a model: which of its layers compute how much again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from graftc.runtime.activations.plan import ActivationPlan

Levels = dict[Any, int]
"""Which of its plans each kind of call runs by."""


@dataclass(frozen=True)
class Call:
    """One call of a graph in a training step.

    Attributes:
        levels: where what is chosen is noted.
        key: under which key.
        plans: what there is to choose from; none where the graph has to run as it is.
    """

    levels: Levels
    key: Any
    plans: Sequence[ActivationPlan]


def chosen(calls: Sequence[Call], budget: float | None) -> None:
    """Choose a plan for every call, so that all of them together keep no more than a part of what autograd keeps by
    itself, at the least cost.

    The first layers give way first: when the backward pass begins with the last ones, everything else is still kept,
    and what is computed again comes on top of it.

    Args:
        calls: in the order in which they run. One that has been chosen for already stays as it is.
        budget: the part; None keeps whatever the cheapest plans keep.
    """
    chosen_before = [call.key in call.levels for call in calls]
    for call in calls:
        call.levels.setdefault(call.key, 0)
    if budget is None:
        return
    limit = budget * sum(call.plans[0].without for call in calls if call.plans)
    kept = sum(call.plans[call.levels[call.key]].kept for call in calls if call.plans)
    while kept > limit:
        steps = [
            (_gain(call), -index, call)
            for index, (call, before) in enumerate(zip(calls, chosen_before, strict=True))
            if not before and call.levels[call.key] + 1 < len(call.plans)
        ]
        if not steps:
            return
        call = max(steps, key=lambda step: step[:2])[2]
        level = call.levels[call.key]
        kept -= call.plans[level].kept - call.plans[level + 1].kept
        call.levels[call.key] = level + 1


def _gain(call: Call) -> float:
    """Bytes that the next plan saves for what it costs more."""
    now, then = call.plans[call.levels[call.key]], call.plans[call.levels[call.key] + 1]
    return (now.kept - then.kept) / max(then.cost - now.cost, 1.0)
