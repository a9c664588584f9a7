"""Code for a CPU reads repeated keys and values without copying them, and computes bit-identical results."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from graftc.passes.core.ir.codegen import function_of
from graftc.passes.core.ir.grouped_heads import share_heads

aten = torch.ops.aten
BATCH, HEADS, GROUPS, WIDTH = 2, 6, 2, 8


def repeated(x: Any, times: int) -> Any:
    """Repeat keys and values as transformers does."""
    rows, groups, length, width = x.shape
    spread = aten.expand.default(aten.unsqueeze.default(x, 2), [rows, groups, times, length, width])
    return aten.reshape.default(spread, [rows, groups * times, length, width])


def interleaved(x: Any, times: int) -> Any:
    """Repeat the groups one after the other, which gives another order of heads."""
    rows, groups, length, width = x.shape
    spread = aten.expand.default(aten.unsqueeze.default(x, 1), [rows, times, groups, length, width])
    return aten.reshape.default(spread, [rows, groups * times, length, width])


def graph_of(keys: Callable[..., Any], values: Callable[..., Any], length: int, also: bool = False) -> fx.Graph:
    """Return a graph of attention over keys and values repeated by two functions; ``also`` returns the keys as well."""

    class Sizes:
        shape = (BATCH, GROUPS, length, WIDTH)

    graph = fx.Graph()
    query, key, value, mask = (graph.placeholder(name) for name in ("q", "k", "v", "mask"))

    def inserted(of: Callable[..., Any], node: fx.Node) -> fx.Node:
        tracer = fx.proxy.GraphAppendingTracer(graph)
        proxy: Any = fx.Proxy(node, tracer)
        proxy.shape = Sizes.shape
        return of(proxy, HEADS // GROUPS).node

    key, value = (graph.call_function(aten.cat.default, ([operand], 2)) for operand in (key, value))
    many, more = inserted(keys, key), inserted(values, value)
    out = graph.call_function(aten.scaled_dot_product_attention.default, (query, many, more, mask))
    graph.output((out, many) if also else (out,))
    return graph


def inputs(queries: int, length: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    rng = torch.Generator().manual_seed(0)
    shapes = ((BATCH, HEADS, queries, WIDTH), *[(BATCH, GROUPS, length, WIDTH)] * 2)
    mask = torch.ones(BATCH, 1, queries, length, dtype=torch.bool).tril(length - queries)
    mask[0, :, :, 0] = False
    return (*(torch.randn(*shape, generator=rng).to(dtype) for shape in shapes), mask)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("queries", [1, 5])
def test_the_same_to_the_bit_without_copies(queries: int, dtype: torch.dtype) -> None:
    length = 7
    graph = graph_of(repeated, repeated, length)
    given = inputs(queries, length, dtype)
    wanted = [t.requires_grad_() for t in given[:3]] if dtype is torch.float64 else []
    (expected,) = fx.GraphModule(nn.Module(), graph)(*given)
    function = function_of(graph, nn.Module(), torch.device("cpu"))
    (actual,) = function(nn.Module(), *given)
    assert torch.equal(actual, expected)
    share_heads(graph)
    *_, attention = (n for n in graph.nodes if n.op == "call_function")
    assert attention.kwargs == {"enable_gqa": True}
    assert [n.name for n in attention.args] == ["q", "cat_default", "cat_default_1", "mask"]
    assert not graph.find_nodes(op="call_function", target=aten.expand.default)
    if wanted:
        slow = torch.autograd.grad(
            fx.GraphModule(nn.Module(), graph_of(repeated, repeated, length))(*given)[0].sum(), wanted
        )
        fast = torch.autograd.grad(actual.sum(), wanted)
        for a, b in zip(fast, slow, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("keys", "values"), [(interleaved, interleaved), (repeated, lambda x, times: x)])
def test_other_orders_and_keys_alone_stay(keys: Callable[..., Any], values: Callable[..., Any]) -> None:
    graph = graph_of(keys, values, 7)
    before = str(graph)
    share_heads(graph)
    assert str(graph) == before


def test_keys_that_are_the_values() -> None:
    graph = fx.Graph()
    query, key, mask = (graph.placeholder(name) for name in ("q", "k", "mask"))
    key = graph.call_function(aten.cat.default, ([key], 2))
    spread = graph.call_function(aten.unsqueeze.default, (key, 2))
    wide = graph.call_function(aten.expand.default, (spread, [BATCH, GROUPS, HEADS // GROUPS, 7, WIDTH]))
    both = graph.call_function(aten.reshape.default, (wide, [BATCH, HEADS, 7, WIDTH]))
    graph.output(graph.call_function(aten.scaled_dot_product_attention.default, (query, both, both, mask)))
    q, k, _, m = inputs(1, 7, torch.float32)
    expected = fx.GraphModule(nn.Module(), graph)(q, k, m)
    share_heads(graph)
    graph.lint()
    assert torch.equal(fx.GraphModule(nn.Module(), graph)(q, k, m), expected)
    names = [n.name for n in graph.nodes if n.op == "call_function"]
    assert names == ["cat_default", "scaled_dot_product_attention_default"]


def test_heads_without_a_cache_stay() -> None:
    graph = fx.Graph()
    query, key, mask = (graph.placeholder(name) for name in ("q", "k", "mask"))
    spread = graph.call_function(aten.unsqueeze.default, (key, 2))
    wide = graph.call_function(aten.expand.default, (spread, [BATCH, GROUPS, HEADS // GROUPS, 7, WIDTH]))
    both = graph.call_function(aten.reshape.default, (wide, [BATCH, HEADS, 7, WIDTH]))
    graph.output(graph.call_function(aten.scaled_dot_product_attention.default, (query, both, both, mask)))
    before = str(graph)
    share_heads(graph)
    assert str(graph) == before


def test_what_others_read_is_still_made() -> None:
    graph = graph_of(repeated, repeated, 7, also=True)
    given = inputs(1, 7, torch.float32)
    expected = fx.GraphModule(nn.Module(), graph)(*given)
    share_heads(graph)
    graph.lint()
    actual = fx.GraphModule(nn.Module(), graph)(*given)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
    assert len(graph.find_nodes(op="call_function", target=aten.expand.default)) == 1


def test_code_for_other_devices_repeats() -> None:
    function = function_of(graph_of(repeated, repeated, 7), nn.Module(), torch.device("meta"))
    assert "enable_gqa" not in inspect.getsource(function)
