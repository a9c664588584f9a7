"""Make each element of a union compute its own copies of values that depend only on tensors and sizes.

If a conversion changes nothing, such as that of a ``float32`` weight to ``float32``, torch returns the weight itself,
and the tracer treats every later reader of that weight as a reader of the conversion. If several elements share the
weight, one of them then reads another's value, although its calls do not have the other's inputs. A named size is read
from the first input that has it, which may also belong to another element.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import fx

from graftc.passes.core.elements.calls import elements_in, innermost, input_names
from graftc.passes.core.ir.new_nodes import copy_node
from graftc.passes.core.ir.program import Program, is_random, mutates

_SIZE = torch.ops.aten.sym_size.int


def separate(program: Program) -> None:
    """Recompute in each element the values that it reads from other elements and that depend only on tensors and sizes.

    Args:
        program: the Program of a union of elements, changed in place; a model's own Program is left unchanged.
    """
    elements = frozenset(elements_in(program.flags))
    if elements:
        _Separation(program, elements).run()


class _Separation:
    """One run of `separate` on a Program."""

    def __init__(self, program: Program, elements: Collection[str]) -> None:
        self._graph, self._elements = program.graph, elements
        specs = {spec.name: spec for spec in program.inputs}
        given = {str(node.target): node for node in self._graph.find_nodes(op="placeholder")}
        self._inputs = {path: [(given[name], specs[name]) for name in input_names(path, given)] for path in elements}
        self._owner = {node: path for path, own in self._inputs.items() for node, _ in own}
        self._specs = {node: specs[name] for name, node in given.items() if name in specs}
        self._settled: dict[fx.Node, frozenset[fx.Node]] = {}
        self._copies: dict[tuple[str, fx.Node], fx.Node] = {}
        self._homes: dict[fx.Node, str] = {}
        for node in reversed(self._graph.nodes):
            self._homes[node] = self._module_of(node) or self._only_reader(node)

    def run(self) -> None:
        """Change the Program in place."""
        for node in list(self._graph.nodes):
            home = self._home(node)
            for source in node.all_input_nodes if home else ():
                if source in self._settled and source.op != "get_attr" and self._is_anothers(source, home):
                    node.replace_input_with(source, self._copied(source, home, node))
            self._settle(node)

    def _settle(self, node: fx.Node) -> None:
        """Record a node if its value depends only on tensors and sizes, along with the inputs whose sizes it reads."""
        sources = node.all_input_nodes
        if node.op == "get_attr":
            self._settled[node] = frozenset()
        elif node.target is _SIZE and node.args[0] in self._specs:
            self._settled[node] = frozenset(sources)
        elif node.op != "call_function" or not sources or is_random(node) or mutates(node):
            return
        elif all(source in self._settled for source in sources):
            self._settled[node] = frozenset[fx.Node]().union(*(self._settled[source] for source in sources))

    def _is_anothers(self, source: fx.Node, home: str) -> bool:
        """Return whether a value is computed in another element, or from the sizes of another element's inputs."""
        return self._home(source) not in ("", home) or any(self._owner[n] != home for n in self._settled[source])

    def _home(self, node: fx.Node) -> str:
        """Return the innermost element that computes a node, or an empty string."""
        return self._homes.get(node) or self._module_of(node)

    def _module_of(self, node: fx.Node) -> str:
        if node.op != "call_function":
            return ""
        return innermost(str(node.meta.get("module", "")), self._elements)

    def _only_reader(self, node: fx.Node) -> str:
        """Return the only element that reads a value without a module, such as a cache state, or an empty string."""
        readers = {self._homes[user] for user in node.users} if node.op == "call_function" else set()
        return readers.pop() if len(readers) == 1 else ""

    def _copied(self, source: fx.Node, home: str, reader: fx.Node) -> fx.Node:
        """Return an element's own copy of another element's value, placed before ``reader``; keep any other value."""
        if source.op == "get_attr" or not self._is_anothers(source, home):
            return source
        if (home, source) not in self._copies:
            copy = self._size_of if source.target is _SIZE and source.args[0] in self._specs else self._computed
            self._copies[home, source] = copy(source, home, reader)
        return self._copies[home, source]

    def _computed(self, source: fx.Node, home: str, reader: fx.Node) -> fx.Node:
        values = {s: self._copied(s, home, reader) for s in source.all_input_nodes}
        with self._graph.inserting_before(reader):
            copied = copy_node(self._graph, source, values.__getitem__, source.name)
        module = reader.meta.get("module", "") if self._home(source) else source.meta.get("module", "")
        copied.meta = {**source.meta, "module": str(module)}
        self._settle(copied)
        return copied

    def _size_of(self, source: fx.Node, home: str, _: fx.Node) -> fx.Node:
        """Read a size from an input of the element itself instead of an input of another element."""
        node, axis = source.args
        assert isinstance(node, fx.Node) and isinstance(axis, int)
        size = self._specs[node].shape[axis]
        own, at = next((own, spec.shape.index(size)) for own, spec in self._inputs[home] if size in spec.shape)
        with self._graph.inserting_after(source):
            copied = copy_node(self._graph, source, {node: own}.__getitem__, source.name)
        copied.args = own, at
        copied.meta = dict(source.meta)
        self._settle(copied)
        return copied
