"""One budget for a model: which of its layers compute how much again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from graftc.runtime.activations.plan import ActivationPlan


class Choice(NamedTuple):
    """How calls of one kind run.

    Attributes:
        level: which of the plans.
        without: bytes that autograd would keep of the call that was chosen for.
        kept: bytes that are kept of it.
        given: bytes of what it is given.
    """

    level: int
    without: int
    kept: int
    given: int


Choices = dict[Any, Choice]
"""How each kind of call of a module runs."""


@dataclass(frozen=True)
class Call:
    """One call of a graph in a training step.

    Attributes:
        choices: where what is chosen is noted.
        key: under which key.
        plans: what there is to choose from; none where the graph has to run as it is.
        kept: bytes that each of them keeps of this call.
        without: bytes that autograd would keep of it.
        given: bytes of what it is given.
    """

    choices: Choices
    key: Any
    plans: Sequence[ActivationPlan]
    kept: Sequence[int] = ()
    without: int = 0
    given: int = 0

    def choose(self, level: int) -> None:
        """Note that a plan is chosen."""
        kept = self.kept[level] if self.plans else self.without
        self.choices[self.key] = Choice(level, self.without, kept, self.given)

    @property
    def level(self) -> int:
        """The plan that is chosen."""
        return self.choices[self.key].level


def chosen(calls: Sequence[Call], budget: float | None) -> float:
    """Choose a plan for every call, so that all of them together keep no more than a part of what autograd keeps by
    itself, at the least cost.

    The first layers give way first: when the backward pass begins with the last ones, everything else is still kept,
    and what is computed again comes on top of it.

    Args:
        calls: in the order in which they run. One that has been chosen for already stays as it is.
        budget: the part; None keeps whatever the cheapest plans keep.

    Returns:
        The part that is kept.
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
    """Bytes that the next plan saves for what it costs more."""
    cost = call.plans[call.level + 1].cost - call.plans[call.level].cost
    return (call.kept[call.level] - call.kept[call.level + 1]) / max(cost, 1.0)
