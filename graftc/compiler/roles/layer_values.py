"""Find the values at the start and end of layers, and the tokens behind these values: :func:`value_sites`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import fx

from graftc.compiler.roles.findings import Structure
from graftc.passes.core.ir.program import ItemsAbove, is_above
from graftc.passes.core.ir.shapes import expression
from graftc.passes.core.sites.sites import SiteKey, TokenNumbers, ValueSite
from graftc.records.roles import Finding, Sublayer
from graftc.specs.claims import SiteKind
from graftc.specs.roles import parse_role


@dataclass
class LayerRun:
    """One run of a layer, with its sublayers in graph order.

    Attributes:
        layer, stack: index of the layer, and path of the list that contains it.
        sublayers: residual branches of the run.
        ends: the marks of its sublayers; when a mark repeats, another run has started.
    """

    layer: int
    stack: str
    sublayers: list[Sublayer] = field(default_factory=list)
    ends: set[Hashable] = field(default_factory=set)

    @property
    def entry(self) -> fx.Node:
        """The value that the layer reads: the stream that its first branch is added to."""
        return cast("fx.Node", min(sublayer.stream for sublayer in self.sublayers))

    @property
    def exit(self) -> fx.Node:
        """The value that the layer returns: the output of its last branch."""
        return cast("fx.Node", max(sublayer.output for sublayer in self.sublayers))

    @property
    def stem(self) -> str:
        """The prefix ``encoder.`` or ``decoder.`` if the model has both stacks, otherwise empty."""
        roles = [parse_role(role) for sublayer in self.sublayers for role in sublayer.roles]
        return "".join(f"{p}." for p in (roles[0].prefixes if roles else ()) if p != "cross")


def layer_values(
    graph: fx.Graph, sublayers: Sequence[Sublayer], end: Callable[[Sublayer], Hashable]
) -> dict[str, list[tuple[LayerRun, str]]]:
    """Return every layer's runs in graph order, each with its stem, by layer path.

    Args:
        graph: the graph.
        sublayers: residual branches in graph order; branches without a role also belong to their layers.
        end: returns a mark for the end of a branch. When a mark repeats in a layer, the layer has started another run.
    """
    branches: dict[str, list[Sublayer]] = defaultdict(list)
    for sublayer in sublayers:
        if sublayer.layer is not None:
            branches[sublayer.owner].append(sublayer)
    sums: ItemsAbove[fx.Node] = ItemsAbove(graph, {sublayer.sum: sublayer.sum for sublayer in sublayers})
    by_owner = {owner: _runs(_outermost(own, sums), end) for owner, own in branches.items()}
    stems: dict[str, str] = {}
    for run in (run for runs in by_owner.values() for run in runs):
        stems[run.stack] = stems.get(run.stack) or run.stem
    return {owner: [(run, stems[run.stack]) for run in runs] for owner, runs in by_owner.items()}


def _runs(sublayers: Iterable[Sublayer], end: Callable[[Sublayer], Hashable]) -> list[LayerRun]:
    """Return the runs of one layer, given its residual branches in graph order."""
    runs: list[LayerRun] = []
    for sublayer in sublayers:
        mark = end(sublayer)
        if not runs or mark in runs[-1].ends:
            assert sublayer.layer is not None
            runs.append(LayerRun(sublayer.layer, sublayer.stack))
        runs[-1].sublayers.append(sublayer)
        runs[-1].ends.add(mark)
    return runs


def _outermost(own: Sequence[Sublayer], sums: ItemsAbove[fx.Node]) -> list[Sublayer]:
    """Return a layer's branches without those inside others, such as the steps of a recurrence, which have no stream.

    A branch is inside another if that one's result depends on its sum, and the stream that it is added to does not.
    """
    inner = {node for outer in own for node in sums.inside(outer.projection, outer.stream)}
    return [each for each in own if each.sum not in inner]


def value_sites(
    graph: fx.Graph, structure: Structure, end: Callable[[Sublayer], Hashable]
) -> Iterator[list[ValueSite]]:
    """Yield the sites ``layer.in`` and ``layer.out`` of every layer, each as a list with one site per run.

    Args:
        graph: the graph.
        structure: the roles and residual branches of the graph.
        end: as for `layer_values`.
    """
    tokens = TokenReaders(graph, structure.findings)
    for owner, runs in layer_values(graph, structure.sublayers, end).items():
        for name in ("layer.in", "layer.out"):
            sites = []
            for use, (run, stem) in enumerate(runs):
                node, role = run.entry if name == "layer.in" else run.exit, stem + name
                key, own = SiteKey(owner, role, use=use), tokens.of(node, stem)
                sites.append(ValueSite(key, (role,), run.layer, run.stack, kind=SiteKind.VALUE, node=node, tokens=own))
            yield sites


def attended(attention: fx.Node, sublayers: Iterable[Sublayer]) -> fx.Node | None:
    """Return the value that the sublayer of an attention call reads, or None if no sublayer contains the call.

    The sublayer is the first attention sublayer that ends after the call.

    Args:
        attention: the node of the attention call.
        sublayers: residual branches in graph order.
    """
    for sublayer in sublayers:
        attends = any(role.endswith("attn.sublayer") for role in sublayer.roles)
        if attends and sublayer.projection > attention and is_above(sublayer.projection, attention):
            return cast("fx.Node", sublayer.normed)
    return None


class TokenReaders:
    """Finds the tokens from which a value of a graph is computed.

    Args:
        graph: the graph.
        findings: the graph's roles; those of token embedding tables show where tokens are looked up.
    """

    def __init__(self, graph: fx.Graph, findings: Iterable[Finding]) -> None:
        lookups = (f for f in findings if parse_role(f.role).name == "embed")
        embedding = torch.ops.aten.embedding.default
        self._lookups = ItemsAbove(graph, {f.node: f for f in lookups if f.node.target is embedding})

    def of(self, value: fx.Node, stem: str) -> TokenNumbers | None:
        """Return the tokens behind ``value: [batch, sequence, ...]``, or None if there are none.

        If there are look-ups in several tables, the largest table counts, since others contain languages and the like.

        Args:
            value: the value.
            stem: ``encoder.`` or ``decoder.`` if the model has both stacks.
        """
        sizes = [expression(size) for size in value.meta["val"].shape[:2]]
        candidates: list[TokenNumbers] = []
        for finding in self._lookups.of(value):
            table, numbers = finding.node.args[:2]
            assert isinstance(table, fx.Node) and isinstance(numbers, fx.Node)
            own = [expression(size) for size in numbers.meta["val"].shape]
            if own == sizes and finding.role.startswith(stem):
                candidates.append(TokenNumbers(numbers, int(table.meta["val"].shape[0])))
        return max(candidates, key=lambda tokens: tokens.entries, default=None)
