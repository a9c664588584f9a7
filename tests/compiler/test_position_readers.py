"""Calls that look up rows of a stored table by the positions of tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import fx

from graftc.compiler.roles.positions import position_readers

aten = torch.ops.aten


@pytest.mark.parametrize(
    ("target", "args", "index"),
    [
        (aten.index.Tensor, lambda table, numbers: (table, [numbers]), 1),
        (aten.index_select.default, lambda table, numbers: (table, 0, numbers), 2),
    ],
)
def test_a_table_of_numbers_is_read_by_positions(target: Any, args: Any, index: int) -> None:
    """A table of integers, such as buckets of distances, is left out, whether it comes before or after the others."""
    graph = fx.Graph()
    tokens = graph.placeholder("tokens")
    tokens.meta["val"] = torch.zeros(2, 5, dtype=torch.int64)
    numbers = graph.call_function(aten.arange.default, (5,))
    numbers.meta["val"] = torch.arange(5)
    expected, read = [], []
    for dtype in (torch.int64, torch.float32, torch.int64, torch.float64):
        table = graph.get_attr("table")
        table.meta["val"] = torch.zeros(64, 8, dtype=dtype)
        read.append(graph.call_function(target, args(table, numbers)))
        read[-1].meta["val"] = table.meta["val"][:5]
        if dtype.is_floating_point:
            expected.append((read[-1], index, table, numbers))
    graph.output((tokens, *read))
    readers = [(reader.reader, reader.index, reader.table, reader.numbers) for reader in position_readers(graph, [])]
    assert readers == expected
