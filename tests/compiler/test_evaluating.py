"""Parts of graphs evaluated in float64: operators without a kernel for it, and values that a graph creates itself."""

from __future__ import annotations

import pytest
import torch
from torch import fx

from graftc.compiler.folding.evaluating import evaluate, grouped_mm

aten = torch.ops.aten


def graph_of(make: object) -> tuple[fx.Graph, fx.Node, fx.Node]:
    """Return a graph with one input ``x``, that input, and the result of ``make(graph, x)``."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    return graph, x, make(graph, x)  # type: ignore[operator]


@pytest.mark.parametrize("ends", [[3, 3, 8], [0, 5, 8], [2, 4, 6]], ids=str)
def test_grouped_products_are_those_of_the_kernel(ends: list[int]) -> None:
    """It equals torch's kernel in bfloat16 on small integers, which are not rounded; groups may be empty."""
    x = torch.randint(-4, 5, (8, 16)).bfloat16()
    weight = torch.randint(-4, 5, (3, 16, 8)).bfloat16()
    offs = torch.tensor(ends, dtype=torch.int32)
    kernel = aten._grouped_mm.default(x, weight, offs)[: ends[-1]]
    actual = grouped_mm(x.double(), weight.double(), offs)
    assert torch.equal(actual[: ends[-1]], kernel.double())
    assert not actual[ends[-1] :].any()
    with pytest.raises(NotImplementedError):
        grouped_mm(x.double(), weight[0].double(), offs)


@pytest.mark.parametrize(
    "make",
    [
        lambda graph, x: graph.call_function(aten.to.dtype, (x, torch.bfloat16)),
        lambda graph, x: graph.call_function(aten.zeros_like.default, (x,), {"dtype": torch.float16}),
        lambda graph, x: graph.call_function(aten.full.default, ([2, 3], 0.1), {"dtype": torch.bfloat16}),
        lambda graph, x: graph.call_function(aten.arange.default, (3,), {"dtype": torch.float32}),
        lambda graph, x: graph.call_function(
            aten.where.ScalarOther, (graph.call_function(aten.gt.Scalar, (x, 0)), x, -1.0)
        ),
        lambda graph, x: graph.call_function(
            aten.where.Scalar, (graph.call_function(aten.gt.Scalar, (x, 0)), 0.0, -1.0)
        ),
    ],
    ids=["type by place", "type by keyword", "constant", "numbers", "mask", "mask of numbers alone"],
)
def test_everything_floating_is_float64(make: object) -> None:
    _, x, output = graph_of(make)
    assert (
        evaluate(output, {x: torch.randn(2, 3, dtype=torch.float64)}, lambda name: torch.empty(0)).dtype
        is torch.float64
    )


def test_what_has_no_value_is_named() -> None:
    _, _, output = graph_of(lambda graph, x: graph.call_function(aten.neg.default, (x,)))
    with pytest.raises(ValueError, match="reads x"):
        evaluate(output, {}, lambda name: torch.empty(0))
