"""Find where a graph turns token positions into values: position tables and rotary embeddings."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, fx

from graftc.compiler.roles.embeddings_and_heads import counts_tokens
from graftc.passes.core.ir.program import above, gives_tensors
from graftc.passes.core.ir.shapes import expression
from graftc.passes.core.sites.sites import Positions
from graftc.records.roles import Finding
from graftc.specs.roles import parse_role

aten = torch.ops.aten
_ROTATING = (aten.cos.default, aten.sin.default)
_LOOK_UPS = {aten.index.Tensor: 1, aten.index_select.default: 2, aten.gather.default: 2}
"""For each look-up operator, the position of the argument that contains the row indices."""
_COUNTING = (aten.arange.default, aten.arange.start, aten.arange.start_step)


def position_readers(graph: fx.Graph, findings: Iterable[Finding]) -> list[Positions]:
    """Return the calls that read integer positions, in graph order.

    These are look-ups in a position table, and calls that turn positions into the angles of a rotary embedding.
    """
    by_reader: dict[fx.Node, Positions] = {}
    for finding in findings:
        if parse_role(finding.role).name == "embed.position" and finding.node.target is aten.embedding.default:
            by_reader[finding.node] = Positions(finding.node, 1)
    for node in graph.nodes:
        if node.target in _ROTATING:
            for reader in _casts(node):
                by_reader[reader] = Positions(reader, 0)
    for positions in _look_ups(graph):
        table = positions.table  # a table computed from positions moves with them
        if table is not None and not any(node in by_reader for node in above([table])):
            by_reader.setdefault(positions.reader, positions)
    return [by_reader[node] for node in sorted(by_reader)]


def _look_ups(graph: fx.Graph) -> Iterator[Positions]:
    """Yield look-ups of one row per token in a floating-point table that depends on no input.

    An example is a table with the sine and cosine of every position. Indices with two axes that count tokens are
    distances and are left out.
    """
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
            continue  # a table as long as the text has no rows for more positions
        if _of_tokens(given) and counts_tokens(given):
            yield Positions(node, index)


def _of_tokens(numbers: fx.Node) -> bool:
    """Return whether positions vary along at most one axis; distances between tokens vary along two."""
    counting = [node for node in above([numbers]) if node.target in _COUNTING]
    lengths = {expression(n.meta["val"].shape[a]) for n in counting for a in range(n.meta["val"].dim())} - {1}
    shape = [expression(size) for size in numbers.meta["val"].shape]
    return not lengths or sum(size in lengths for size in shape) <= 1


def _casts(node: fx.Node) -> list[fx.Node]:
    """Return the calls above a rotation that convert integers to floating point."""
    casts, pending, seen = [], [node], {node}
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
                casts.append(current)
    return casts
