"""Check that the outputs' gradients reach every trainable tensor, including through layers that call functions."""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from graftc.passes.core.ir.effects import Memory
from graftc.passes.core.ir.functions import Bodies, FunctionCall, call, calls, renamed
from graftc.passes.core.ir.program import Program, above
from graftc.passes.core.weights.store import Store
from graftc.specs.errors.diagnostics import GraftError

aten = torch.ops.aten
_STOPS_GRADIENT = {aten.detach.default, aten.sym_size.int, aten.argmax.default}


def require_gradient_paths(program: Program, store: Store) -> None:
    """Raise an error if no gradient reaches some trainable tensor of an adaptation.

    Raises:
        GraftError: GC023 naming the tensor.
    """
    bodies = Bodies()
    reached = _Reached(program, bodies)
    for name in _tensors(program, bodies):
        if not store.is_adapter(name) or name not in store:  # tensors of calls are created after those of bodies
            continue
        if store.get(name).requires_grad and name not in reached.tensors:
            raise GraftError(
                "GC023",
                f"{name} is trainable, but no gradient path leads from it to an output",
                hint="leave the site out of the target, or use a model head that reads its output",
            )


def _tensors(program: Program, bodies: Bodies) -> Iterator[str]:
    """Yield the names of the tensors that a Program reads, with those read by calls last."""
    yield from (str(node.target) for node in program.graph.find_nodes(op="get_attr"))
    for one in calls(program.graph):
        yield from bodies.tensors(one)


def _carries_gradient(node: fx.Node) -> bool:
    value = node.meta.get("val")
    values = value if isinstance(value, list | tuple) else [value]
    return node.target not in _STOPS_GRADIENT and any(
        isinstance(v, Tensor) and (v.is_floating_point() or v.is_complex()) for v in values
    )


class _Reached:
    """The tensors from which a gradient path leads to an output.

    Attributes:
        tensors: names of the tensors.
    """

    def __init__(self, program: Program, bodies: Bodies) -> None:
        self.tensors: set[str] = set()
        self._bodies = bodies
        self._writers = _Writers(program.graph)
        self._known: dict[Any, tuple[list[fx.Node], list[fx.Node]]] = {}
        start = filter(_carries_gradient, program.output_node.all_input_nodes)
        reached = above(start, sources=lambda node: filter(_carries_gradient, self._sources(node)))
        self.tensors.update(str(node.target) for node in reached if node.op == "get_attr")

    def _sources(self, node: fx.Node) -> list[fx.Node]:
        """Return the values from which a value is computed.

        For a node that picks a result of a call, these are the call's inputs on which that result depends; the
        call's tensors on which it depends are added to `tensors`.
        """
        source = node.args[0] if node.target is operator.getitem else None
        if not isinstance(source, fx.Node) or source.target is not call:
            return [] if node.target is call else [*node.all_input_nodes, *self._writers.of(node)]
        one, index = FunctionCall(source), node.args[1]
        key = (one.body, *one.given, *one.body_results, index)
        if key not in self._known:
            result: fx.Node = one.body_results[index]  # type: ignore[index]
            self._known[key] = _leading_to(one, result, self._bodies.region(one), self._writers)
        sources, tensors = self._known[key]
        self.tensors |= {renamed(str(tensor.target), one.body, one.path) for tensor in tensors}
        inputs = dict(zip(one.given, one.inputs, strict=True))
        return [inputs.get(each, each) for each in sources]


class _Writers:
    """The nodes that write in place to the memory of values: ``x[:, :4] *= y`` makes ``x`` depend on ``y``."""

    def __init__(self, graph: fx.Graph) -> None:
        self._memory = Memory(graph)
        self._by_root: dict[fx.Node, list[fx.Node]] = defaultdict(list)
        for node, roots in self._memory.writes.items():
            for root in roots:
                self._by_root[root].append(node)

    def of(self, node: fx.Node) -> list[fx.Node]:
        """Return the nodes that write to a value, or to the value of which it is a view."""
        return [writer for root in self._memory.roots(node) for writer in self._by_root.get(root, ())]


def _leading_to(
    one: FunctionCall, result: fx.Node, computed: Sequence[fx.Node], writers: _Writers
) -> tuple[list[fx.Node], list[fx.Node]]:
    """Return the values from outside a body, and the tensors, from which a gradient path leads to ``result``."""
    inside = set(computed).difference(one.given)

    def sources(node: fx.Node) -> Iterable[fx.Node]:
        return filter(_carries_gradient, [*node.all_input_nodes, *writers.of(node)] if node in inside else ())

    reached = above(filter(_carries_gradient, [result]), sources=sources)
    ends = [node for node in reached if node not in inside]
    return [n for n in ends if n.op != "get_attr"], [n for n in ends if n.op == "get_attr"]
