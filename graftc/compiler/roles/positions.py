"""Where a graph turns the positions of tokens into values: tables of positions, and rotations."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, fx

from graftc.compiler.roles.embeddings_and_heads import counts_tokens
from graftc.compiler.roles.findings import Finding
from graftc.passes.core.ir.program import above, gives_tensors, marks_above
from graftc.passes.core.ir.shapes import expression
from graftc.passes.core.sites.sites import Positions
from graftc.specs.roles import parse_role

aten = torch.ops.aten
_ROTATING = (aten.cos.default, aten.sin.default)
_LOOK_UPS = {aten.index.Tensor: 1, aten.index_select.default: 2, aten.gather.default: 2}
"""Which argument of a look-up in a table the numbers of rows are."""
_COUNTING = (aten.arange.default, aten.arange.start, aten.arange.start_step)


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
    for positions in _look_ups(graph):
        table = positions.table  # one that is made of positions itself moves with them
        if table is not None and not any(node in found for node in above([table])):
            found.setdefault(positions.reader, positions)
    return [found[node] for node in sorted(found)]


def _look_ups(graph: fx.Graph) -> Iterator[Positions]:
    """Look-ups of one row for each token in a table of values that no input has a part in, such as the sines and
    cosines of every position. Numbers of two axes that count tokens are distances, which stay as they are."""
    data: set[fx.Node] = set()
    for node in graph.nodes:
        sources = set(filter(gives_tensors, node.all_input_nodes))
        if node.op == "placeholder" or (sources & data and node.target is not aten.sym_size.int):
            data.add(node)
        index = _LOOK_UPS.get(node.target)
        if index is None or not isinstance(node.args[0], fx.Node) or node.args[0] in data:
            continue
        given: Any = node.args[index]
        if isinstance(given, list | tuple):
            given = given[0] if len(given) == 1 else None
        by_axis = index < 2 or isinstance(node.args[1], int)
        if not by_axis or not isinstance(given, fx.Node) or not node.args[0].meta["val"].is_floating_point():
            continue
        if not isinstance(node.args[0].meta["val"].shape[node.args[1] if index > 1 else 0], int):
            continue  # a table that is as long as the text has no rows for more positions
        if _of_tokens(given) and counts_tokens(given):
            yield Positions(node, index)


def _of_tokens(numbers: fx.Node) -> bool:
    """Whether numbers differ along one axis at most: distances of tokens differ along two."""
    counting = [node for node in above([numbers]) if node.target in _COUNTING]
    lengths = {expression(n.meta["val"].shape[a]) for n in counting for a in range(n.meta["val"].dim())} - {1}
    shape = [expression(size) for size in numbers.meta["val"].shape]
    return not lengths or sum(size in lengths for size in shape) <= 1


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
