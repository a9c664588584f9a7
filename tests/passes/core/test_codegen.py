"""Generated code of graphs: outputs of tensors and inputs, wherever the tensors come from, shared while in use."""

from __future__ import annotations

import gc
import linecache
import threading
import weakref

import pytest
import torch
from torch import Tensor, fx, nn

from graftc.passes.core.ir import codegen
from graftc.passes.core.ir.codegen import RecentCode, executable_of, function_of

CPU = torch.device("cpu")
aten = torch.ops.aten


def linear() -> fx.Graph:
    """Return a graph of ``x @ inner.weight.T + bias`` that reads the bias twice."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    weight, bias, again = (graph.create_node("get_attr", name) for name in ("inner.weight", "bias", "bias"))
    product = graph.call_function(aten.linear.default, (x, weight, bias))
    graph.output((product, graph.call_function(aten.add.Tensor, (product, again))))
    return graph


class Tree(nn.Module):
    def __init__(self, seed: int, buffer: bool = False) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.inner = nn.Linear(3, 2, bias=False)
        bias = torch.randn(2)
        if buffer:
            self.register_buffer("bias", bias)
        else:
            self.bias = nn.Parameter(bias)

    def expected(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.inner.weight, self.bias) + self.bias


def test_tensors_come_from_a_module_or_as_arguments() -> None:
    x, tree, other = torch.randn(4, 3), Tree(0), Tree(1)
    executable = executable_of(linear(), CPU)
    assert set(executable.tensors) == {"inner.weight", "bias"} and executable.layers == ()
    within = executable.over(tree)
    given = {name: tensor.detach() for name, tensor in other.named_parameters()}
    assert torch.equal(within(tree, x)[1], tree.expected(x))
    assert torch.equal(within(other, x)[1], other.expected(x)), "a module like it has the same code"
    assert torch.equal(executable(given, [x])[1], other.expected(x))
    assert executable.over(Tree(2)) is within and executable.over(Tree(2, buffer=True)) is not within
    buffered = Tree(3, buffer=True)
    assert torch.equal(function_of(linear(), buffered, CPU)(buffered, x)[1], buffered.expected(x))


def test_equal_graphs_share_code() -> None:
    assert executable_of(linear(), CPU) is executable_of(linear(), CPU)
    assert executable_of(linear(), CPU) is not executable_of(linear(), torch.device("meta"))


def test_one_code_runs_on_two_sets_of_tensors_in_two_threads() -> None:
    executable = executable_of(linear(), CPU)
    trees, x = [Tree(0), Tree(1)], torch.randn(4, 3)
    within, wrong = executable.over(trees[0]), list[int]()
    together = threading.Barrier(4)

    def by_module(number: int) -> None:
        together.wait()
        expected = trees[number].expected(x)
        wrong.extend(number for _ in range(200) if not torch.equal(within(trees[number], x)[1], expected))

    def by_argument(number: int) -> None:
        together.wait()
        expected, given = trees[number].expected(x), dict(trees[number].named_parameters())
        wrong.extend(number for _ in range(200) if not torch.equal(executable(given, [x])[1], expected))

    threads = [threading.Thread(target=run, args=(n,)) for n in (0, 1) for run in (by_module, by_argument)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_the_oldest_code_goes_first_and_what_runs_goes_on() -> None:
    recent = RecentCode(2)
    first = recent.get("first", lambda: [1])
    recent.get("second", lambda: [2])
    assert recent.get("first", lambda: [3]) is first
    recent.get("third", lambda: [4])
    assert len(recent) == 2 and recent.get("first", lambda: [5]) is first
    assert recent.get("second", lambda: [6]) == [6], "it was used the longest time ago"


def test_code_that_nobody_uses_is_gone_with_its_source(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codegen, "RECENT", RecentCode(3))
    graph = linear()
    next(iter(graph.nodes)).name = "only_here"
    graph.find_nodes(op="placeholder")[0].target = "only_here"
    function = function_of(graph, Tree(0), CPU)
    known, file = weakref.ref(function), function.__code__.co_filename
    assert file in linecache.cache
    del function
    for size in range(4):
        other = fx.Graph()
        other.output(other.call_function(aten.add.Tensor, (other.placeholder("x"), size)))
        function_of(other, Tree(0), CPU)
    gc.collect()
    assert known() is None and file not in linecache.cache and len(codegen.RECENT) == 3
