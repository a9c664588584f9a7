"""The values that layers start from and end with, with the tokens that they are made of: :func:`value_sites`."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import fx

from graftc.compiler.roles.findings import Finding, Structure, Sublayer
from graftc.passes.core.ir.program import is_above, marks_above
from graftc.passes.core.ir.shapes import expression
from graftc.passes.core.sites.sites import SiteKey, TokenNumbers, ValueSite
from graftc.specs.claims import SiteKind
from graftc.specs.roles import parse_role


@dataclass
class LayerRun:
    """One run of one layer, with its sublayers in graph order.

    Attributes:
        owner: the layer's path.
        layer, stack: its index, and the path of the list it is in.
        sublayers: its residual branches.
        ends: what tells a sublayer from another run of the same one.
    """

    owner: str
    layer: int
    stack: str
    sublayers: list[Sublayer] = field(default_factory=list)
    ends: set[Hashable] = field(default_factory=set)

    @property
    def entry(self) -> fx.Node:
        """What the layer reads: the stream that its first branch is added to."""
        return min(sublayer.stream for sublayer in self.sublayers)

    @property
    def exit(self) -> fx.Node:
        """What the layer gives: what its last branch ends with."""
        return max(sublayer.output for sublayer in self.sublayers)

    @property
    def stem(self) -> str:
        """``encoder.`` or ``decoder.`` where the model has both stacks; empty elsewhere."""
        roles = [parse_role(role) for sublayer in self.sublayers for role in sublayer.roles]
        return "".join(f"{p}." for p in (roles[0].prefixes if roles else ()) if p != "cross")


def layer_values(
    sublayers: Sequence[Sublayer], end: Callable[[Sublayer], Hashable]
) -> dict[str, list[tuple[LayerRun, str]]]:
    """The runs of every layer, each with its stem, by the layer's path and in graph order.

    Args:
        sublayers: residual branches in graph order; those without a role belong to their layers too.
        end: what a branch ends in. A layer in which one appears a second time has begun to run again.
    """
    found: dict[str, list[LayerRun]] = {}
    for sublayer in sublayers:
        if sublayer.layer is None:
            continue
        runs = found.setdefault(sublayer.owner, [])
        mark = end(sublayer)
        if not runs or mark in runs[-1].ends:
            runs.append(LayerRun(sublayer.owner, sublayer.layer, sublayer.stack))
        runs[-1].sublayers.append(sublayer)
        runs[-1].ends.add(mark)
    stems: dict[str, str] = {}
    for run in (run for runs in found.values() for run in runs):
        stems[run.stack] = stems.get(run.stack) or run.stem
    return {owner: [(run, stems[run.stack]) for run in runs] for owner, runs in found.items()}


def value_sites(
    graph: fx.Graph, structure: Structure, end: Callable[[Sublayer], Hashable]
) -> Iterator[list[ValueSite]]:
    """The sites ``layer.in`` and ``layer.out`` of every layer, one for each of its runs.

    Args:
        graph: the graph.
        structure: its roles and residual branches.
        end: see `layer_values`.
    """
    tokens = TokenReaders(graph, structure.findings)
    for owner, runs in layer_values(structure.sublayers, end).items():
        for name in ("layer.in", "layer.out"):
            sites = []
            for use, (run, stem) in enumerate(runs):
                node, role = run.entry if name == "layer.in" else run.exit, stem + name
                key, own = SiteKey(owner, role, use=use), tokens.of(node, stem)
                sites.append(ValueSite(key, (role,), run.layer, run.stack, kind=SiteKind.VALUE, node=node, tokens=own))
            yield sites


def attended(attention: fx.Node, sublayers: Iterable[Sublayer]) -> fx.Node | None:
    """What the sublayer of an attention reads: the first one that ends behind it; None where it is in none.

    Args:
        attention: the node of the attention.
        sublayers: residual branches in graph order.
    """
    for sublayer in sublayers:
        attends = any(role.endswith("attn.sublayer") for role in sublayer.roles)
        if attends and sublayer.projection > attention and is_above(sublayer.projection, attention):
            return sublayer.normed
    return None


class TokenReaders:
    """Which tokens each value of a graph is made of.

    Args:
        graph: the graph.
        findings: its roles: those of tables of token embeddings say where tokens are looked up.
    """

    def __init__(self, graph: fx.Graph, findings: Iterable[Finding]) -> None:
        self._lookups = [
            f
            for f in findings
            if parse_role(f.role).name == "embed" and f.node.target is torch.ops.aten.embedding.default
        ]
        own = {finding.node: 1 << number for number, finding in enumerate(self._lookups)}
        self._above = marks_above(graph, own)

    def of(self, value: fx.Node, stem: str) -> TokenNumbers | None:
        """The tokens of ``value: [batch, sequence, ...]``: of the largest table, where several are looked up, since
        others hold languages and the like.

        Args:
            value: the value.
            stem: ``encoder.`` or ``decoder.`` where the model has both stacks.
        """
        mark, sizes = self._above[value], [expression(size) for size in value.meta["val"].shape[:2]]
        found: list[TokenNumbers] = []
        for number, finding in enumerate(self._lookups):
            table, numbers = finding.node.args[:2]
            assert isinstance(table, fx.Node) and isinstance(numbers, fx.Node)
            own = [expression(size) for size in numbers.meta["val"].shape]
            if mark >> number & 1 and own == sizes and (not stem or finding.role.startswith(stem)):
                found.append(TokenNumbers(numbers, int(table.meta["val"].shape[0])))
        return max(found, key=lambda tokens: tokens.entries, default=None)
