"""Choosing what is kept: the fewest bytes from which all that the backward pass reads can be had again.

Values that are computed again are separated from those that are kept by a minimum cut through the graph: what may be
computed again needs its operands, what may not has to be kept where it is needed, and keeping costs bytes.
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
"""Bytes that a call has to save, where there is no budget: following what autograd saves takes time of its own."""

FLOPS_PER_BYTE = 16
"""Floating point operations of a product that take as long as moving a byte."""


_FUNCTIONS = frozenset({operator.getitem, projections, unpacked})
"""Functions of Python that give the same again."""


@dataclass(frozen=True)
class Recomputation:
    """Values that are computed again together.

    Attributes:
        targets: nodes whose values the backward pass reads.
        roots: nodes that are kept for it.
        nodes: what is computed again, in order.
    """

    targets: tuple[fx.Node, ...]
    roots: tuple[fx.Node, ...]
    nodes: tuple[fx.Node, ...]


@dataclass(frozen=True)
class ActivationPlan:
    """What is kept of a graph, and what is computed again.

    Attributes:
        parts: what is computed again; empty where that saves nothing.
        kept: bytes that are kept of the run that the plan was made for.
        cost: what computing again takes, in bytes moved; a product counts for `FLOPS_PER_BYTE` a byte.
    """

    parts: tuple[Recomputation, ...]
    kept: int
    cost: float = 0.0


def kept_by(parts: Iterable[Recomputation], recorded: Recorded) -> int:
    """Bytes that are kept of a run, of any sizes, where some values are computed again."""
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
    """Ways to run a graph, from the one that is cheapest in time to the one that keeps least.

    Args:
        graph: what runs.
        recorded: a run of it.
        is_buffer: whether a tensor is a buffer, which may have changed when the backward pass comes.
        costly: whether products and attentions may be computed again too. Otherwise there is one plan: what is as cheap
            as moving it is computed again where that saves memory.
        only: operators that may be called again; None for all that give the same again.
    """
    choice = _Choice(graph, recorded, is_buffer, only)
    if not costly:
        return [choice.plan(_LEAST, costly=False, worth=WORTH)]
    first = choice.plan(_LEAST, costly=False)
    found = {first.kept: first}

    def between(low: float, least: ActivationPlan, high: float, most: ActivationPlan, steps: int) -> None:
        """Find the plans for prices between two, where these differ."""
        if not steps or least.kept == most.kept:
            return
        middle = (low + high) / 2
        plan = choice.plan(math.exp(middle), costly=True)
        if plan.kept not in found or found[plan.kept].cost > plan.cost:
            found[plan.kept] = plan
        between(low, least, middle, plan, steps - 1)
        between(middle, plan, high, most, steps - 1)

    least = choice.plan(_LEAST, costly=True)
    found.setdefault(least.kept, least)
    between(math.log(_LEAST), least, math.log(_MOST), first, _STEPS)
    ordered = sorted(found.values(), key=lambda plan: -plan.kept)
    return [plan for plan in ordered if plan.kept <= first.kept]


_LEAST, _MOST = 1e-4, 1e3
"""Prices of computing a byte again, in bytes that are kept."""

_STEPS = 6
"""How often the range of prices is halved where plans differ."""


class _Choice:
    """A graph as a network whose minimum cuts are choices."""

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
        """Of the storage that holds a node's value."""
        return self.recorded.sizes[self.recorded.storages[node]]

    def is_buffer(self, node: fx.Node) -> bool:
        """Whether a node reads a buffer."""
        return node.op == "get_attr" and self._is_buffer(str(node.target))

    def may_repeat(self, node: fx.Node, costly: bool) -> bool:
        """Whether a value may be computed again; costly ones only where ``costly`` says so."""
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
        """Whether computing a value takes longer than moving it: a product with a small rank is as cheap as a sum."""
        flops = self.recorded.flops.get(node, 0)
        return flops > FLOPS_PER_BYTE * (self.bytes_of(node) if node in self.recorded.storages else 0)

    def plan(self, price: float, costly: bool, worth: int = 1) -> ActivationPlan:
        """The choice for which kept bytes, and the cost of computing again times its price, are least; autograd's own
        where less than ``worth`` bytes are saved."""
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
        """Nodes on the smallest cut between what cannot be computed again and what is read in the backward pass: of
        several, the one nearest to the latter, since it leaves the least to compute."""
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
            elif self._is_held(node):
                network.add_edge(inner, outer, capacity=0)
            elif self._is_tensor(node):
                network.add_edge(inner, outer)  # a view is kept by what it is a view of
            else:
                network.add_edge(inner, outer, capacity=0)  # a number
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
        # Of all smallest cuts, networkx finds the one that is nearest to its target.
        _, (_, near) = nx.minimum_cut(network, source, sink, flow_func=boykov_kolmogorov)
        return {node for node in self.graph.nodes if (node, 1) in near and (node, 0) not in near}

    def _parts(self, targets: list[fx.Node], kept: Collection[fx.Node]) -> Iterator[Recomputation]:
        """The targets with what is computed again for them, those that share a part of it together."""
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

    def _is_held(self, node: fx.Node) -> bool:
        """Whether a call gives a tensor of the model itself, as a mask of gradients does, which is there anyway."""
        return self.recorded.storages.get(node) in self.recorded.own

    def _is_tensor(self, node: fx.Node) -> bool:
        return node in self.recorded.storages or node in self.recorded.several
