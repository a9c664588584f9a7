"""Programs that are nearly right: one node, literal, input or tensor is changed."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, fx

from graftc.passes.core.ir.program import Program, nodes_in
from graftc.passes.core.ir.shapes import expression

aten = torch.ops.aten
_OTHER = {
    aten.add.Tensor: aten.sub.Tensor,
    aten.sub.Tensor: aten.add.Tensor,
    aten.mul.Tensor: aten.add.Tensor,
    aten.div.Tensor: aten.mul.Tensor,
    aten.gelu.default: aten.relu.default,
    aten.silu.default: aten.relu.default,
    aten.relu.default: aten.gelu.default,
    aten.tanh.default: aten.sigmoid.default,
    aten.cos.default: aten.sin.default,
    aten.sin.default: aten.cos.default,
    aten.rsqrt.default: aten.sqrt.default,
    aten.eq.Scalar: aten.ne.Scalar,
    aten.ne.Scalar: aten.eq.Scalar,
    aten.lt.Scalar: aten.ge.Scalar,
    aten.le.Tensor: aten.lt.Tensor,
    aten.minimum.default: aten.maximum.default,
}


def mutants(program: Program, count: int, seed: int = 0) -> Iterator[tuple[str, Program]]:
    """Yield copies of a Program, each with one change, and its description; kinds of changes alternate."""
    generator = random.Random(seed)
    kinds = list(_KINDS.items())
    yielded, attempts = 0, 0
    while yielded < count and attempts < 50 * count:
        name, change = kinds[attempts % len(kinds)]
        attempts += 1
        copied = program.copy()
        done = change(copied.graph, generator)
        if done:
            yielded += 1
            yield f"{name}: {done}", copied


def _calls(graph: fx.Graph) -> list[fx.Node]:
    return [node for node in graph.nodes if node.op == "call_function" and node.users]


def _type(node: fx.Node) -> object:
    value = node.meta.get("val")
    return (value.dtype, tuple(str(expression(s)) for s in value.shape)) if isinstance(value, Tensor) else None


def _drop(graph: fx.Graph, generator: random.Random) -> str:
    """Remove a node; its readers read one of its inputs of the same type instead."""
    pairs = [(n, s) for n in _calls(graph) for s in n.all_input_nodes if _type(n) is not None and _type(n) == _type(s)]
    if not pairs:
        return ""
    node, source = generator.choice(pairs)
    node.replace_all_uses_with(source)
    graph.erase_node(node)
    return str(node)


def _literal(graph: fx.Graph, generator: random.Random) -> str:
    """Change a number among a node's arguments."""
    places = [
        (node, place)
        for node in _calls(graph)
        for place, value in [*enumerate(node.args), *node.kwargs.items()]
        if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 2**31
    ]
    node, place = generator.choice(places)
    value = node.kwargs[place] if isinstance(place, str) else node.args[place]
    assert isinstance(value, int | float)
    other = value * generator.choice([0.5, 1.1, 2.0]) + 0.01 if isinstance(value, float) else value + 1
    if isinstance(place, str):
        node.kwargs = {**node.kwargs, place: other}
    else:
        node.update_arg(place, other)
    return f"{node} {value} -> {other}"


def _swap(graph: fx.Graph, generator: random.Random) -> str:
    """Exchange two inputs of a node."""
    swaps = []
    for node in _calls(graph):
        own = [i for i, arg in enumerate(node.args) if isinstance(arg, fx.Node)]
        swaps += [(node, i, j) for i in own for j in own if i < j and node.args[i] is not node.args[j]]
    node, i, j = generator.choice(swaps)
    a, b = node.args[i], node.args[j]
    node.update_arg(i, b)
    node.update_arg(j, a)
    return str(node)


def _operator(graph: fx.Graph, generator: random.Random) -> str:
    """Replace the operator of a node."""
    nodes = [node for node in _calls(graph) if node.target in _OTHER]
    if not nodes:
        return ""
    node = generator.choice(nodes)
    node.target = _OTHER[node.target]
    return f"{node} {node.target}"


def _rewire(graph: fx.Graph, generator: random.Random) -> str:
    """Make a node read another value of the same type, from further up."""
    node = generator.choice(_calls(graph))
    before: list[fx.Node] = []
    for other in graph.nodes:
        if other is node:
            break
        before.append(other)
    pairs = [
        (s, o) for s in set(nodes_in(node.args)) for o in before if o is not s and _type(o) == _type(s) is not None
    ]
    if not pairs:
        return ""
    source, other = generator.choice(sorted(pairs, key=str))
    node.replace_input_with(source, other)
    return f"{node} {source} -> {other}"


def _tensor(graph: fx.Graph, generator: random.Random) -> str:
    """Exchange two tensors of one type."""
    own = graph.find_nodes(op="get_attr")
    pairs = [(a, b) for a in own for b in own if str(a.target) < str(b.target) and _type(a) == _type(b) is not None]
    if not pairs:
        return ""
    a, b = generator.choice(pairs)
    a.target, b.target = b.target, a.target
    return f"{a} and {b}"


_KINDS: Mapping[str, Callable[[fx.Graph, random.Random], str]] = {
    "dropped": _drop,
    "literal": _literal,
    "swapped": _swap,
    "operator": _operator,
    "rewired": _rewire,
    "tensors": _tensor,
}
