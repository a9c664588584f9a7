"""Leaving out layers that do the same as others: what a deep model takes follows from what two shallow ones take.

Between equal layers, the memory of a step grows by the same bytes from one to the next, in the forward and in the
backward pass. So whenever something is made before or behind the layers that are left out, what there is then is an
affine function of their number, and between them it lies between what there is at the ends.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import fx

from graftc.runtime.activations.simulated import Levels, Part

FRONT = 2
"""Repetitions that stay at the beginning: the first one may be given what wants no gradient."""

KEPT = FRONT + 1
"""Repetitions that stay."""

_LONGEST = 6
"""Layers of the longest pattern that is looked for."""


class Step(NamedTuple):
    """A part of a training step.

    Attributes:
        backward: of the backward pass.
        call: which call of a layer begins it.
    """

    backward: bool
    call: int


@dataclass(frozen=True)
class Run:
    """Calls of layers in which a pattern repeats.

    Attributes:
        start: the number of the first call.
        period: calls of the pattern.
        count: how often it is there.
    """

    start: int
    period: int
    count: int

    def left_out(self, count: int) -> range:
        """The calls that go where it is there less often."""
        first = self.start + FRONT * self.period
        return range(first, first + (self.count - count) * self.period)


def runs_of(graph: fx.Graph, kind: Callable[[fx.Node], Hashable]) -> list[Run]:
    """Runs that are worth shortening.

    Args:
        graph: calls layers.
        kind: what is equal for calls of layers that do the same.
    """
    calls = graph.find_nodes(op="call_module")
    number = {call: index for index, call in enumerate(calls)}
    kinds = [kind(call) for call in calls]

    def follows(index: int, period: int) -> bool:
        """Whether a call does the same as one before, with what came so much later."""
        return kinds[index] == kinds[index - period] and _shifted(
            calls[index - period].args, calls[index].args, number, period
        )

    found: list[Run] = []
    index = 0
    while index < len(calls):
        best = Run(index, 1, 1)
        for period in range(1, _LONGEST + 1):
            end = index + period
            # Of the first repetition the inputs come from elsewhere.
            while end < len(calls) and (
                follows(end, period) if end >= index + 2 * period else kinds[end] == kinds[end - period]
            ):
                end += 1
            run = Run(index, period, (end - index) // period)
            if run.count > 1 and run.period * run.count > best.period * best.count:
                best = run
        if best.count * best.period > (2 * KEPT + 2) * best.period:
            found.append(best)
        index += best.period * best.count
    return found


def _shifted(before: Any, after: Any, number: Mapping[fx.Node, int], period: int) -> bool:
    """Whether values are the same but for calls that come so much later."""
    if isinstance(before, fx.Node) or isinstance(after, fx.Node):
        if before is after:
            return True
        if not (isinstance(before, fx.Node) and isinstance(after, fx.Node)):
            return False
        if before in number or after in number:
            return number.get(after) == number.get(before, -period - 1) + period
        same = before.op == after.op == "call_function" and before.target == after.target
        return same and _shifted((before.args, dict(before.kwargs)), (after.args, dict(after.kwargs)), number, period)
    if isinstance(before, Mapping):
        return (
            isinstance(after, Mapping)
            and before.keys() == after.keys()
            and all(_shifted(value, after[key], number, period) for key, value in before.items())
        )
    if isinstance(before, Sequence) and not isinstance(before, str):
        return (
            isinstance(after, Sequence)
            and len(before) == len(after)
            and all(_shifted(a, b, number, period) for a, b in zip(before, after, strict=True))
        )
    return bool(before == after)


def shorten(graph: fx.Graph, counts: Mapping[Run, int]) -> None:
    """Leave out repetitions, in place.

    Args:
        graph: calls layers.
        counts: how many stay of each run.
    """
    calls = graph.find_nodes(op="call_module")
    unused = {node for node in graph.nodes if not node.users}
    for run, count in counts.items():
        gone = run.left_out(count)
        for index in gone:
            stand_in = gone.start - run.period + (index - gone.start) % run.period
            calls[index].replace_all_uses_with(calls[stand_in])
        for index in reversed(gone):
            graph.erase_node(calls[index])
    for node in reversed(graph.nodes):
        if node.op == "call_function" and not node.users and node not in unused:
            graph.erase_node(node)


def deep(short: Levels, longer: Mapping[Run, Levels]) -> int:
    """The peak of a model in full.

    Args:
        short: the levels where of every run `KEPT` repetitions are there.
        longer: for each run, the levels with one repetition of it more.
    """
    aligned, start = list[tuple[int, Levels]](), 0
    for run in sorted(longer, key=lambda run: run.start):
        more = run.count - KEPT
        aligned.append((more, _aligned(longer[run], run, run.start - start)))
        start += more * run.period
    return max(_highest(levels, [(more, found[part]) for more, found in aligned]) for part, levels in short.items())


def _highest(levels: list[int], longer: Iterable[tuple[int, list[int]]]) -> int:
    """The highest level of a part, where some repetitions are there more often."""
    found = list(levels)
    for more, others in longer:
        if len(others) != len(levels):  # of a part in which something else happens, the peaks alone
            levels, others, found = [max(levels)], [max(others)], [max(found)]
        found = [level + more * (there - here) for level, here, there in zip(found, levels, others, strict=True)]
    return max(found)


def _aligned(levels: Levels, run: Run, start: int) -> Levels:
    """The levels by the parts that the model has without the last repetition of the front's.

    Args:
        levels: with it.
        run: which is longer.
        start: the number of its first call in the short model.
    """
    found: dict[Part, list[int]] = {}
    more = range(start + FRONT * run.period, start + (FRONT + 1) * run.period)
    for part, there in levels.items():
        if isinstance(part, Step):
            if part.call in more:
                continue
            if part.call >= more.stop:
                part = part._replace(call=part.call - run.period)
        found[part] = there
    return found
