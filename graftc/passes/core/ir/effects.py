"""The writes in a graph: which nodes change a value in place, and which node owns the memory.

An operator's schema declares which arguments are changed in place and which are aliased by the results. The few
operators whose schemas omit this are listed here. A written value is traced back to the origin of its memory: an input,
a Store tensor, or a value that the graph has computed.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Iterable, Iterator
from functools import cache
from typing import Any

import torch
from torch import fx

from graftc.compat.operators import schema_of
from graftc.passes.core.ir.program_key import Mode

aten = torch.ops.aten

SHARING = frozenset(
    {
        *("alpha_dropout", "atleast_1d", "atleast_2d", "atleast_3d", "broadcast_tensors", "cartesian_prod"),
        *("combinations", "dropout", "einsum", "feature_alpha_dropout", "feature_dropout", "meshgrid", "pixel_shuffle"),
        *("pixel_unshuffle", "rrelu", "tensordot", "type_as"),
    }
)
"""ATen operators whose result may be an argument or a view of one without their schemas declaring it."""

_STATISTICS = {
    aten.batch_norm.default: "training",
    aten.cudnn_batch_norm.default: "training",
    aten.instance_norm.default: "use_input_stats",
    aten.miopen_batch_norm.default: "training",
    aten.native_batch_norm.default: "training",
}
"""Operators that update statistics passed to them without declaring it, with the argument that enables the update."""


class Memory:
    """The nodes that own the memory of a graph's values, computed only if some operator may write.

    In most graphs no operator writes, so the owners do not matter.

    Attributes:
        writes: every node that changes a value in place, with the possible owners of the memory, in graph order.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self._roots: dict[fx.Node, frozenset[fx.Node]] = {}
        self.writes: dict[fx.Node, frozenset[fx.Node]] = {}
        for node in graph.nodes if any(_may_write(node.target) for node in graph.nodes) else ():
            given = dict(_arguments(node))
            shared = self._of(v for name, v in given.items() if _shares(node.target, name) and not _is_product(node, v))
            self._roots[node] = shared or frozenset({node})
            if written := self._of(v for name, v in given.items() if _writes(node, name, given)):
                self.writes[node] = written
        self._written = frozenset[fx.Node]().union(*self.writes.values())

    def roots(self, node: fx.Node) -> frozenset[fx.Node]:
        """Return the nodes whose memory a value may share: for a new value, only itself."""
        return self._roots.get(node, frozenset({node}))

    def settled(self, *nodes: fx.Node) -> bool:
        """Return whether nothing writes to the values' memory, so that they may be read at any time."""
        return all(self._written.isdisjoint(self.roots(node)) for node in nodes)

    def _of(self, values: Iterable[Any]) -> frozenset[fx.Node]:
        nodes: set[fx.Node] = set()
        fx.map_arg(tuple(values), lambda source: nodes.update(self._roots[source]))
        return frozenset(nodes)


def updated(graph: fx.Graph) -> dict[str, fx.Node]:
    """Return the Store tensors that a graph writes to, by name, each with the first node that does so."""
    tensors: dict[str, fx.Node] = {}
    for node, roots in Memory(graph).writes.items():
        for root in roots:
            if root.op == "get_attr":
                tensors.setdefault(str(root.target), node)
    return tensors


def flaw(graph: fx.Graph, mode: Mode, is_buffer: Callable[[str], bool]) -> tuple[fx.Node, str] | None:
    """Return the first node with a forbidden write and a description of the error, or None if there is none.

    A graph may change values that it has computed and, in train mode, buffers.
    """
    for node, roots in Memory(graph).writes.items():
        for root in sorted(roots):
            if root.op == "placeholder":
                return node, f"it writes to the input {root.target}"
            if root.op == "get_attr" and not is_buffer(str(root.target)):
                return node, f"it writes to the parameter {root.target}"
            if root.op == "get_attr" and mode != "train":
                return node, f"it writes to {root.target}, which is allowed only in train mode"
    return None


def _arguments(node: fx.Node) -> Iterator[tuple[str, Any]]:
    """Yield a call's arguments with their names in the schema, or with their positions for Python functions."""
    target = node.target
    if node.op != "call_function":
        return
    if not isinstance(target, torch._ops.OpOverload):
        yield from ((str(i), value) for i, value in enumerate(node.args))
        return
    yield from zip((argument.name for argument in schema_of(target).arguments), node.args, strict=False)
    yield from node.kwargs.items()


def _shares(target: Any, name: str) -> bool:
    if not isinstance(target, torch._ops.OpOverload):
        return target is operator.getitem and name == "0"
    return name in _aliased(target)


@cache
def _aliased(target: Any) -> Collection[str]:
    """Return the names of the arguments whose memory an operator's result may share."""
    schema = schema_of(target)
    whole = target.namespace == "aten" and schema.name.removeprefix("aten::") in SHARING
    return frozenset(a.name for a in schema.arguments if whole or a.alias_info is not None)


def _is_product(node: fx.Node, operands: Any) -> bool:
    """Return whether a node is an einsum of several operands, which creates a new value.

    An einsum of a single operand may return a view of it.
    """
    return node.target is aten.einsum.default and isinstance(operands, (list, tuple)) and len(operands) > 1


def _may_write(target: Any) -> bool:
    return isinstance(target, torch._ops.OpOverload) and (target in _STATISTICS or schema_of(target).is_mutable)


def _writes(node: fx.Node, name: str, given: dict[str, Any]) -> bool:
    target: Any = node.target
    if not _may_write(target):
        return False
    if target in _STATISTICS:
        return name in ("running_mean", "running_var") and given.get(_STATISTICS[target]) is not False
    return any(
        a.name == name and a.alias_info is not None and a.alias_info.is_write for a in schema_of(target).arguments
    )
