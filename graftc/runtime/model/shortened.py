"""Derive the memory use of a deep model from that of two shallow models, by leaving out identical layers.

Each further identical layer increases the memory use of a step by the same number of bytes, in the forward pass as well
as in the backward pass. So whenever a tensor is created before or after the layers that are left out, the memory in use
is an affine function of the number of these layers; within them, it lies between the values at both ends.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import fx

from graftc.compat.pytree import tree_flatten
from graftc.runtime.activations.simulated import Levels, Part

FRONT = 2
"""The number of repetitions kept at the beginning; the inputs of the first one may not require gradients."""

KEPT = FRONT + 1
"""The number of repetitions kept in total."""

_LONGEST = 6
"""The number of layers in the longest pattern to search for."""


class Step(NamedTuple):
    """A part of a training step.

    Attributes:
        backward: whether it belongs to the backward pass.
        call: the index of the layer call that begins it.
    """

    backward: bool
    call: int


@dataclass(frozen=True)
class Run:
    """Consecutive layer calls in which a pattern repeats.

    Attributes:
        start: the index of the first call.
        period: the number of calls in the pattern.
        count: the number of repetitions.
    """

    start: int
    period: int
    count: int

    def left_out(self, count: int) -> range:
        """Return the indices of the calls that are left out if the pattern is repeated only ``count`` times."""
        first = self.start + FRONT * self.period
        return range(first, first + (self.count - count) * self.period)


def runs_of(graph: fx.Graph, kind: Callable[[fx.Node], Hashable]) -> list[Run]:
    """Return the runs that are worth shortening.

    Args:
        graph: a graph that calls layers.
        kind: a function whose results are equal for calls to identical layers.
    """
    calls = graph.find_nodes(op="call_module")
    number = {call: index for index, call in enumerate(calls)}
    kinds = [kind(call) for call in calls]

    def follows(index: int, period: int) -> bool:
        """Return whether a call is like the one ``period`` calls earlier, with inputs that are shifted accordingly."""
        return kinds[index] == kinds[index - period] and _shifted(
            calls[index - period].args, calls[index].args, number, period
        )

    runs: list[Run] = []
    index = 0
    while index < len(calls):
        best = Run(index, 1, 1)
        for period in range(1, _LONGEST + 1):
            end = index + period
            # The first repetition gets its inputs from outside the run.
            while end < len(calls) and (
                follows(end, period) if end >= index + 2 * period else kinds[end] == kinds[end - period]
            ):
                end += 1
            run = Run(index, period, (end - index) // period)
            if run.count > 1 and run.period * run.count > best.period * best.count:
                best = run
        if best.count * best.period > (2 * KEPT + 2) * best.period:
            runs.append(best)
        index += best.period * best.count
    return runs


def _shifted(before: Any, after: Any, number: Mapping[fx.Node, int], period: int) -> bool:
    """Return whether two values are the same except that the calls in the second come ``period`` calls later."""
    leaves, form = tree_flatten(before)
    later_leaves, later_form = tree_flatten(after)
    pairs = zip(leaves, later_leaves, strict=True)
    return form == later_form and all(_is_shifted(one, other, number, period) for one, other in pairs)


def _is_shifted(before: Any, after: Any, number: Mapping[fx.Node, int], period: int) -> bool:
    """Implement `_shifted` for values that are not containers."""
    if before is after or not (isinstance(before, fx.Node) and isinstance(after, fx.Node)):
        return bool(before == after)
    if before in number or after in number:
        return number.get(after) == number.get(before, -period - 1) + period
    same = before.op == after.op == "call_function" and before.target == after.target
    return same and _shifted((before.args, dict(before.kwargs)), (after.args, dict(after.kwargs)), number, period)


def shorten(graph: fx.Graph, counts: Mapping[Run, int]) -> None:
    """Remove repetitions from a graph, in place.

    Args:
        graph: a graph that calls layers.
        counts: the number of repetitions to keep in each run.
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
    """Return the peak memory use of the model with all layers.

    Args:
        short: the memory levels with `KEPT` repetitions of every run.
        longer: for each run, the memory levels with one more repetition of that run.
    """
    aligned, start = list[tuple[int, Levels]](), 0
    for run in sorted(longer, key=lambda run: run.start):
        more = run.count - KEPT
        aligned.append((more, _aligned(longer[run], run, run.start - start)))
        start += more * run.period
    return max(_highest(levels, [(more, further[part]) for more, further in aligned]) for part, levels in short.items())


def _highest(levels: list[int], longer: Iterable[tuple[int, list[int]]]) -> int:
    """Return the highest memory level of a part in a model with more repetitions of some runs."""
    totals = list(levels)
    for more, others in longer:
        if len(others) != len(levels):  # parts that differ are compared by their peaks only
            levels, others, totals = [max(levels)], [max(others)], [max(totals)]
        totals = [level + more * (there - here) for level, here, there in zip(totals, levels, others, strict=True)]
    return max(totals)


def _aligned(levels: Levels, run: Run, start: int) -> Levels:
    """Return levels keyed by the parts of the shorter model, which lacks one repetition after the first `FRONT`.

    Args:
        levels: the memory levels of the model with that repetition.
        run: the run that is longer in that model.
        start: the index of the run's first call in the shorter model.
    """
    aligned: dict[Part, list[int]] = {}
    more = range(start + FRONT * run.period, start + (FRONT + 1) * run.period)
    for part, there in levels.items():
        if isinstance(part, Step):
            if part.call in more:
                continue
            if part.call >= more.stop:
                part = part._replace(call=part.call - run.period)
        aligned[part] = there
    return aligned
