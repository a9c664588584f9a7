"""Where a graph turns the positions of tokens into values: tables of positions, and rotations."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, fx

from graftc.compiler.roles.findings import Finding
from graftc.passes.core.ir.program import marks_above
from graftc.passes.core.sites.sites import Positions
from graftc.specs.roles import parse_role

aten = torch.ops.aten
_ROTATING = (aten.cos.default, aten.sin.default)


def position_readers(graph: fx.Graph, findings: Iterable[Finding]) -> list[Positions]:
    """The calls that read whole numbers of positions, in graph order: look-ups in a table of positions, and what turns
    numbers into the angles of a rotary embedding."""
    found: dict[fx.Node, Positions] = {}
    for finding in findings:
        if parse_role(finding.role).name == "embed.position" and finding.node.target is aten.embedding.default:
            found[finding.node] = Positions(finding.node, 1)
    for node in graph.nodes:
        if node.target in _ROTATING:
            for reader in _casts(node):
                found[reader] = Positions(reader, 0)
    return [found[node] for node in sorted(found)]


class PositionsAbove:
    """Which calls that read positions each value of a graph depends on.

    Args:
        graph: the graph.
        findings: its roles.
    """

    def __init__(self, graph: fx.Graph, findings: Iterable[Finding]) -> None:
        self._all = position_readers(graph, findings)
        own = {positions.reader: 1 << number for number, positions in enumerate(self._all)}
        self._above = marks_above(graph, own)

    def of(self, value: fx.Node) -> tuple[Positions, ...]:
        """Those of a value, in graph order."""
        return tuple(positions for number, positions in enumerate(self._all) if self._above[value] >> number & 1)


def _casts(node: fx.Node) -> list[fx.Node]:
    """The calls above a rotation that make numbers of whole ones."""
    found, pending, seen = [], [node], {node}
    while pending:
        current = pending.pop()
        for source in current.all_input_nodes:
            value = source.meta.get("val")
            if not isinstance(value, Tensor) or source in seen or source.op == "get_attr":
                continue
            seen.add(source)
            if value.is_floating_point():
                pending.append(source)
            elif source is current.args[0]:
                found.append(current)
    return found
