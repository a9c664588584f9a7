"""Distribute a model's activation budget, which determines how much each layer recomputes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from graftc.runtime.activations.minimum_cut import ActivationPlan


class Choice(NamedTuple):
    """The plan chosen for calls of one kind.

    Attributes:
        level: the index of the chosen plan.
        without: the bytes that autograd would keep for the call for which the choice was made.
        kept: the bytes kept for that call.
        given: the bytes of that call's inputs.
    """

    level: int
    without: int
    kept: int
    given: int


Choices = dict[Any, Choice]
"""The plan chosen for each kind of call of a module."""


@dataclass(frozen=True)
class Call:
    """One call to a graph in a training step.

    Attributes:
        choices: the mapping in which the choice is recorded.
        key: the key of the choice in that mapping.
        plans: the plans to choose from; empty if the graph has to run unchanged.
        kept: the bytes that each plan keeps for this call.
        without: the bytes that autograd would keep for this call.
        given: the bytes of the call's inputs.
    """

    choices: Choices
    key: Any
    plans: Sequence[ActivationPlan]
    kept: Sequence[int] = ()
    without: int = 0
    given: int = 0

    def choose(self, level: int) -> None:
        """Record the choice of a plan."""
        kept = self.kept[level] if self.plans else self.without
        self.choices[self.key] = Choice(level, self.without, kept, self.given)

    @property
    def level(self) -> int:
        """The index of the chosen plan."""
        return self.choices[self.key].level


def chosen(calls: Sequence[Call], budget: float | None) -> float:
    """Choose a plan for every call so that together they meet a budget at the least cost.

    Early layers are chosen for recomputation first: the backward pass begins with the last layers while everything else
    is still kept, so recomputing the last layers would add to the peak.

    Args:
        calls: the calls in the order in which they run; existing choices are not changed.
        budget: the maximum fraction to keep of the bytes that autograd would keep; None keeps whatever the cheapest
            plans keep.

    Returns:
        The fraction that is kept.
    """
    open_calls = [call for call in calls if call.key not in call.choices]
    for call in open_calls:
        call.choose(0)
    planned = [call for call in calls if call.plans]
    total = sum(call.without for call in planned)
    kept = sum(call.choices[call.key].kept for call in planned)
    while budget is not None and kept > budget * total:
        steps = [
            (_gain(call), -index, call) for index, call in enumerate(open_calls) if call.level + 1 < len(call.plans)
        ]
        if not steps:
            break
        call = max(steps, key=lambda step: step[:2])[2]
        kept -= call.kept[call.level] - call.kept[call.level + 1]
        call.choose(call.level + 1)
    return kept / total if total else 0.0


def _gain(call: Call) -> float:
    """Return the bytes that the next plan saves, divided by its additional cost."""
    cost = call.plans[call.level + 1].cost - call.plans[call.level].cost
    return (call.kept[call.level] - call.kept[call.level + 1]) / max(cost, 1.0)
