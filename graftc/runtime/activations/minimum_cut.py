"""Choose the values to keep: the fewest bytes from which everything that the backward pass reads can be recomputed.

A minimum cut through the graph separates the values that are recomputed from those that are kept. Recomputing a value
requires its operands; a value that may not be recomputed has to be kept if it is needed; keeping a value costs bytes.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import networkx as nx
import torch
from networkx.algorithms.flow import boykov_kolmogorov
from torch import fx

from graftc.passes.core.ir.effects import Memory
from graftc.passes.core.ir.program import is_random, mutates
from graftc.passes.core.ops.projections import projections
from graftc.passes.core.ops.unpack import unpacked
from graftc.runtime.activations.recording import Recorded

WORTH = 2**20
"""The smallest worthwhile saving per call, in bytes, if there is no budget; tracking saved tensors takes time."""

FLOPS_PER_BYTE = 16
"""The number of a product's floating-point operations that take as long as moving one byte."""


_FUNCTIONS = frozenset({operator.getitem, projections, unpacked})
"""Python functions that return the same result on every call."""


@dataclass(frozen=True)
class Recomputation:
    """Values that are recomputed together.

    Attributes:
        targets: the nodes whose values the backward pass reads.
        roots: the nodes whose values are kept so that the targets can be computed from them.
        nodes: the nodes that are recomputed, in order.
    """

    targets: tuple[fx.Node, ...]
    roots: tuple[fx.Node, ...]
    nodes: tuple[fx.Node, ...]


@dataclass(frozen=True)
class ActivationPlan:
    """A plan for which of a graph's values are kept and which are recomputed.

    Attributes:
        parts: the recomputed values; empty if recomputing saves nothing.
        kept: the bytes kept in the run for which the plan was made.
        cost: the cost of recomputation, in bytes moved; `FLOPS_PER_BYTE` operations of a product count as one byte.
    """

    parts: tuple[Recomputation, ...]
    kept: int
    cost: float = 0.0


def kept_by(parts: Iterable[Recomputation], recorded: Recorded) -> int:
    """Return the bytes that a run keeps if some values are recomputed; its sizes may differ from the planned run's."""
    again = {recorded.storages[target] for part in parts for target in part.targets}
    roots = {recorded.storages[root] for part in parts for root in part.roots if root in recorded.storages}
    return sum(recorded.sizes[storage] for storage in (recorded.saved - again) | (roots - recorded.own))


def plans(
    graph: fx.Graph,
    recorded: Recorded,
    is_buffer: Callable[[str], bool],
    costly: bool = False,
    only: Collection[Any] | None = None,
) -> list[ActivationPlan]:
    """Return the plans for running a graph, from the fastest to the one that keeps least.

    Args:
        graph: the graph to run.
        recorded: the record of a run of the graph.
        is_buffer: a function that returns whether a tensor is a buffer, which may change before the backward pass.
        costly: whether products and attention may be recomputed as well. Otherwise there is only one plan: values that
            are as cheap to compute as to move are recomputed if that saves memory.
        only: the operators that may be called again; None for all that return the same result on every call.
    """
    choice = _Choice(graph, recorded, is_buffer, only)
    if not costly:
        return [choice.plan(_LEAST, costly=False, worth=WORTH)]
    first = choice.plan(_LEAST, costly=False)
    by_bytes = {first.kept: first}

    def between(low: float, least: ActivationPlan, high: float, most: ActivationPlan, steps: int) -> None:
        """Find the plans for prices between ``low`` and ``high``, if the plans for those two prices differ."""
        if not steps or least.kept == most.kept:
            return
        middle = (low + high) / 2
        plan = choice.plan(math.exp(middle), costly=True)
        if plan.kept not in by_bytes or by_bytes[plan.kept].cost > plan.cost:
            by_bytes[plan.kept] = plan
        between(low, least, middle, plan, steps - 1)
        between(middle, plan, high, most, steps - 1)

    least = choice.plan(_LEAST, costly=True)
    by_bytes.setdefault(least.kept, least)
    between(math.log(_LEAST), least, math.log(_MOST), first, _STEPS)
    ordered = sorted(by_bytes.values(), key=lambda plan: -plan.kept)
    return [plan for plan in ordered if plan.kept <= first.kept]


_LEAST, _MOST = 1e-4, 1e3
"""The lowest and the highest price of recomputing a byte, in bytes kept."""

_STEPS = 6
"""How many times to halve the range of prices while plans differ."""


class _Choice:
    """A graph as a flow network, whose minimum cuts are choices of the values to keep."""

    def __init__(
        self,
        graph: fx.Graph,
        recorded: Recorded,
        is_buffer: Callable[[str], bool],
        only: Collection[Any] | None = None,
    ) -> None:
        self.graph, self.recorded, self._is_buffer, self._only = graph, recorded, is_buffer, only
        self.owners = recorded.owners()
        self.owned = {node for node in self.owners.values() if node.op != "get_attr"}
        self.settled = Memory(graph).settled
        self.needed = {s for s in recorded.saved if s in self.owners and self.owners[s] in self.owned}

    def bytes_of(self, node: fx.Node) -> int:
        """Return the bytes of the storage that contains a node's value."""
        return self.recorded.sizes[self.recorded.storages[node]]

    def is_buffer(self, node: fx.Node) -> bool:
        """Return whether a node reads a buffer."""
        return node.op == "get_attr" and self._is_buffer(str(node.target))

    def may_repeat(self, node: fx.Node, costly: bool) -> bool:
        """Return whether a value may be recomputed; costly values may be recomputed only if ``costly``."""
        operands = node.all_input_nodes
        if node.op != "call_function" or is_random(node) or mutates(node) or not self.settled(node, *operands):
            return False
        if any(map(self.is_buffer, operands)):
            return False
        target = node.target
        if self._only is not None and target not in self._only:
            return False
        if isinstance(target, torch._ops.OpOverload):
            if target.namespace != "aten" and torch.Tag.pointwise not in target.tags:
                return False
        elif target not in _FUNCTIONS:
            return False
        return costly or not self.is_costly(node)

    def is_costly(self, node: fx.Node) -> bool:
        """Return whether computing a value takes longer than moving it.

        A product with a small rank is as cheap as a sum.
        """
        flops = self.recorded.flops.get(node, 0)
        return flops > FLOPS_PER_BYTE * (self.bytes_of(node) if node in self.recorded.storages else 0)

    def plan(self, price: float, costly: bool, worth: int = 1) -> ActivationPlan:
        """Return the plan with the smallest sum of kept bytes and ``price`` times the cost of recomputation.

        If this saves fewer than ``worth`` bytes, return autograd's own choice.
        """
        kept = self._cut(price, costly)
        targets = [self.owners[s] for s in self.needed if self.owners[s] not in kept and s not in self.recorded.outputs]
        parts = tuple(self._parts([t for t in targets if t.op == "call_function"], kept))
        total, without = kept_by(parts, self.recorded), self.recorded.saved_bytes
        if without - total < worth:
            return ActivationPlan((), without)
        return ActivationPlan(parts, total, sum(self._cost(node) for part in parts for node in part.nodes))

    def _cost(self, node: fx.Node) -> float:
        moved = self.bytes_of(node) if node in self.owned else 0
        return moved + self.recorded.flops.get(node, 0) / FLOPS_PER_BYTE

    def _cut(self, price: float, costly: bool) -> set[fx.Node]:
        """Return the nodes on a minimum cut between values that cannot be recomputed and those the backward pass reads.

        Among several minimum cuts, choose the one nearest to the latter, which leaves the least to compute.
        """
        network: nx.DiGraph[object] = nx.DiGraph()
        source, sink = "source", "sink"
        network.add_nodes_from((source, sink))
        for node in self.graph.nodes:
            if node.op in ("output", "get_attr"):
                continue
            inner, outer = (node, 0), (node, 1)
            if node in self.owned:
                free = self.recorded.storages[node] in self.recorded.outputs
                network.add_edge(inner, outer, capacity=0 if free else self.bytes_of(node))
            elif self._is_tensor(node) and self.recorded.storages.get(node) not in self.recorded.own:
                network.add_edge(inner, outer)  # a view is kept by keeping its base
            else:  # a Python number, or the model's own tensor, which exists anyway, such as a gradient mask
                network.add_edge(inner, outer, capacity=0)
            if self.may_repeat(node, costly):
                network.add_edge(source, inner, capacity=price * self._cost(node))
                for operand in node.all_input_nodes:
                    if operand.op != "get_attr":
                        network.add_edge((operand, 1), inner)
            else:
                network.add_edge(source, inner)
        for storage in self.needed:
            network.add_edge((self.owners[storage], 1), sink)
        if not self.needed:
            return set()
        # Among all minimum cuts, networkx finds the one nearest to the sink.
        _, (_, near) = nx.minimum_cut(network, source, sink, flow_func=boykov_kolmogorov)
        return {node for node in self.graph.nodes if (node, 1) in near and (node, 0) not in near}

    def _parts(self, targets: list[fx.Node], kept: Collection[fx.Node]) -> Iterator[Recomputation]:
        """Yield groups of targets with the nodes recomputed for them; targets that share such nodes form a group."""
        links: nx.Graph[fx.Node] = nx.Graph()
        roots: dict[fx.Node, set[fx.Node]] = {}
        pending, seen = list(targets), set(targets)
        while pending:
            node = pending.pop()
            links.add_node(node)
            roots[node] = set()
            for operand in node.all_input_nodes:
                if operand.op == "get_attr":
                    continue
                if operand in kept or operand.op == "placeholder" or not self._is_tensor(operand):
                    roots[node].add(operand)
                    continue
                links.add_edge(node, operand)
                if operand not in seen:
                    seen.add(operand)
                    pending.append(operand)
        wanted = set(targets)
        for group in nx.connected_components(links):
            yield Recomputation(
                tuple(sorted(group & wanted)),
                tuple(sorted(set().union(*(roots[node] for node in group)))),
                tuple(sorted(group)),
            )

    def _is_tensor(self, node: fx.Node) -> bool:
        return node in self.recorded.storages or node in self.recorded.several
