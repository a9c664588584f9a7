"""Replace calls to untraced layers with the nodes of traced layers that are like them.

See `graftc.compiler.capture.alike.repeats`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, repeat
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from graftc.compiler.capture.alike.modules import Layer
from graftc.compiler.capture.alike.repeats import AGAIN, MARK, Repeats, TracedCall
from graftc.passes.core.ir.functions import call
from graftc.passes.core.ir.new_nodes import copy_node
from graftc.passes.core.ir.past_inputs import past_name, past_place
from graftc.passes.core.ir.shapes import expression

_CAST = torch.ops.aten.to.dtype
FEWEST_CALLS = 2
"""The smallest number of calls for which a function is worth the effort."""


class NotAlikeError(Exception):
    """Raised if the nodes of one layer cannot replace a call to another."""


class SizesFromDataError(NotAlikeError):
    """Raised if sizes in a layer depend on values."""


def written_once(graph: fx.Graph, repeats: Repeats, names: Mapping[str, str], inputs: Sequence[str]) -> None:
    """Write out the traced nodes for each kind's second layer, and turn later layers, except the last, into calls.

    These are function calls as in `graftc.passes.core.ir.functions`.

    Args:
        graph: the exported graph, with the model's tensors as attributes; changed in place.
        repeats: the result of `traced_once` during the export.
        names: the names of the model's tensors, by attribute name.
        inputs: the names of the graph's inputs, in order. Inputs for which others stood in are added to the graph.

    Raises:
        NotAlikeError: if a traced layer is not self-contained, if the last layer does not do the same, or if an input
            that stood in for others is read by anything except untraced calls.
    """
    writing = _Writing(graph, repeats, names)
    writing.bring_back(inputs)
    writing.run()


@dataclass(eq=False)
class _Segment:
    """A traced call: its inputs, its nodes except sizes and tensors of the model, and its outputs."""

    call: TracedCall
    given: list[fx.Node]
    nodes: list[fx.Node] = field(default_factory=list)
    results: list[fx.Node] = field(default_factory=list)

    @property
    def prefix(self) -> str:
        return f"{self.call.layer.path}."


class _Writing:
    def __init__(self, graph: fx.Graph, repeats: Repeats, names: Mapping[str, str]) -> None:
        self._graph, self._repeats = graph, repeats
        self._tensors = {names.get(str(n.target), str(n.target)): n for n in graph.find_nodes(op="get_attr")}
        self._names = {node: name for name, node in self._tensors.items()}
        self._segments: dict[int, _Segment] = {}
        self._marks: set[fx.Node] = set()
        self._again: dict[int, list[fx.Node]] = defaultdict(list)
        current: _Segment | None = None
        for node in graph.nodes:
            if node.target is MARK:
                begins, number, tensors = node.args
                traced = repeats.calls[number]
                self._marks.add(node)
                if begins:
                    current = self._segments[number] = _Segment(traced, [tensors[at] for at in traced.given])
                else:
                    self._segments[number].results = list(tensors)
                    current = None
            elif node.target is AGAIN:
                self._again[node.args[0]].append(node)
            elif current is not None and node.op != "get_attr" and not _is_size(node):
                current.nodes.append(node)

    def run(self) -> None:
        for number in sorted(self._again):
            segment = self._segments[number]
            self._read_uncast(segment)
            self._require_closed(segment)
            for other in self._segments.values():
                if other.call.layer.is_last and segment.call.stands_for(other.call):
                    self._require_same(segment, other)
        for first, *others in self._again.values():
            given, body, outputs = self._write_out(first)
            for node in others:
                if len(others) < FEWEST_CALLS:
                    self._write_out(node)
                else:
                    self._call(node, given, body, outputs)
        for node in self._marks:
            self._graph.erase_node(node)

    def bring_back(self, inputs: Sequence[str]) -> None:
        """Add the hidden inputs to the graph, and let untraced calls read their own inputs."""
        hidden = self._repeats.hidden.stand_ins
        shown = [name for name in inputs if name not in hidden]
        placeholders = dict(zip(shown, self._graph.find_nodes(op="placeholder"), strict=True))
        stood_in = {placeholders[name]: name for name in hidden.values()}
        last: fx.Node | None = None
        for name in inputs:
            if name in hidden:
                first = placeholders[hidden[name]]
                with self._graph.inserting_after(last):
                    placeholders[name] = self._graph.placeholder(name)
                placeholders[name].meta = dict(first.meta)
            last = placeholders[name]
        slots: dict[fx.Node, int | None] = {}
        for node in chain.from_iterable(self._again.values()):
            inputs_of, segment, layer = self._read(node)
            slot = slots[node] = segment.call.slot(layer)
            for at in range(segment.call.arguments, len(inputs_of)):
                if inputs_of[at] in stood_in and slot is not None:
                    kind, _, part = past_place(stood_in[inputs_of[at]])
                    inputs_of[at] = placeholders[past_name(kind, slot, part)]
            node.args = (*node.args[:2], inputs_of)
        for first, name in stood_in.items():
            for user in first.users:
                own = slots.get(user) == past_place(name)[1]
                if not (own or user in self._marks or _is_size(user)):
                    raise NotAlikeError(f"{user} reads {name}, which stood in for others")

    def _read_uncast(self, segment: _Segment) -> None:
        """Rewire readers outside a layer from a no-op cast to the cast's source.

        Such a cast returns the tensor itself, so the tracer records the cast as the origin of hidden states that the
        model has collected.
        """
        inside = {*segment.nodes, *self._marks}
        for node in segment.nodes:
            source = node.args[0] if node.target is _CAST and node not in segment.results else None
            if not isinstance(source, fx.Node) or source.meta["val"].dtype != node.meta["val"].dtype:
                continue
            for user in [user for user in node.users if user not in inside]:
                user.replace_input_with(node, source)

    def _require_closed(self, segment: _Segment) -> None:
        """Check that a call reads only its arguments and its own tensors, and that only its result is used outside."""
        inside, path = set(segment.nodes), segment.call.layer.path
        for node in segment.nodes:
            for source in node.all_input_nodes:
                own = self._names.get(source, "").startswith(segment.prefix)
                if not (own or source in inside or source in segment.given or _is_size(source)):
                    raise NotAlikeError(f"{path} reads {source}, which is not its own")
            outside = [user for user in node.users if user not in inside and not _is_size(user)]
            if node not in segment.results and not self._marks.issuperset(outside):
                raise NotAlikeError(f"{node} of {path} is used outside of it")
            if free_unbacked_symbols(node.meta.get("val")):
                raise SizesFromDataError(f"sizes in {path} depend on data")

    def _require_same(self, a: _Segment, b: _Segment) -> None:
        """Check that two calls compute the same function."""
        same = dict(zip(a.given, b.given, strict=True))

        def tensor(source: fx.Node, segment: _Segment) -> Any:
            size = expression(source.meta.get("val")) if _is_size(source) else None
            return size if size is not None else self._names[source].removeprefix(segment.prefix)

        def first(source: fx.Node) -> Any:
            return same[source] if source in same else tensor(source, a)

        def second(source: fx.Node) -> Any:
            return source if source in known else tensor(source, b)

        known = {*b.given, *b.nodes}
        alike = len(a.nodes) == len(b.nodes) and len(a.results) == len(b.results)
        alike = alike and (a.call.result, a.call.parts) == (b.call.result, b.call.parts)
        for one, other in zip(a.nodes, b.nodes, strict=False):
            alike = alike and one.target is other.target and _type(one.meta.get("val")) == _type(other.meta.get("val"))
            read: list[tuple[fx.Node, fx.Node]] = []
            alike = alike and alike_arguments((one.args, one.kwargs), (other.args, other.kwargs), read)
            alike = alike and all(first(source) == second(like) for source, like in read)
            same[one] = other
        if not alike or [same[node] for node in a.results] != b.results:
            raise NotAlikeError(f"{b.call.layer.path} does not do what {a.call.layer.path} does")

    def _write_out(self, again: fx.Node) -> tuple[list[fx.Node], str, list[fx.Node]]:
        """Replace a call with nodes; return its inputs, the path of the layer, and the nodes of its result."""
        inputs, segment, layer = self._read(again)
        copies: dict[fx.Node, fx.Node] = dict(zip(segment.given, inputs, strict=True))

        def copied(source: fx.Node) -> Any:
            if source in copies or _is_size(source):
                return copies.get(source, source)
            return self._tensors[f"{layer.path}.{self._names[source].removeprefix(segment.prefix)}"]

        with self._graph.inserting_before(again):
            for node in segment.nodes:
                new = copies[node] = copy_node(self._graph, node, copied)
                new.meta.update(val=node.meta.get("val"), nn_module_stack=_moved(node, segment, layer.path))
        outputs = [copies[node] for node in segment.results]
        picked: Any
        for user in list(again.users):  # each selects one of the outputs
            _, picked = user.args
            user.replace_all_uses_with(outputs[picked])
            self._graph.erase_node(user)
        self._graph.erase_node(again)
        return inputs, layer.path, outputs

    def _call(self, again: fx.Node, given: list[fx.Node], body: str, results: list[fx.Node]) -> None:
        inputs, _, layer = self._read(again)
        again.target, again.args = call, (layer.path, body, inputs, list(given), list(results))
        again.meta = {"val": [node.meta.get("val") for node in results]}
        for user in again.users:
            user.meta = {"val": user.meta.get("val")}

    def _read(self, again: fx.Node) -> tuple[list[fx.Node], _Segment, Layer]:
        """Return a call's inputs, the segment that was traced in its place, and its layer."""
        args: Any = again.args
        number, position, inputs = args
        return list(inputs), self._segments[number], self._repeats.layers[position]


def _moved(node: fx.Node, segment: _Segment, path: str) -> dict[str, tuple[str, Any]]:
    """Return a node's module stack, starting at its layer, as it would be in another layer."""
    before = segment.call.layer.path
    stack = (node.meta.get("nn_module_stack") or {}).items()
    inside = [
        (key, at, cls) for key, (at, cls) in stack if at == before or at.startswith((segment.prefix, f"{before}@"))
    ]
    return {key: (path + at[len(before) :], cls) for key, at, cls in inside}


def alike_arguments(a: Any, b: Any, read: list[tuple[fx.Node, fx.Node]]) -> bool:
    """Return whether two nodes' arguments are equal apart from the nodes in them, which are collected in pairs."""
    if type(a) is not type(b):
        return False
    if isinstance(a, fx.Node):
        read.append((a, b))
        return True
    if isinstance(a, tuple | list):
        return len(a) == len(b) and all(map(alike_arguments, a, b, repeat(read)))
    if isinstance(a, Mapping):
        return a.keys() == b.keys() and all(alike_arguments(a[key], b[key], read) for key in a)
    return a is b or bool(a == b)


def _type(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.dtype, value.device, value.dim(), [expression(size) for size in (*value.shape, *value.stride())]
    return [_type(item) for item in value] if isinstance(value, list | tuple) else expression(value)


def _is_size(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), torch.SymInt | torch.SymFloat | torch.SymBool)
