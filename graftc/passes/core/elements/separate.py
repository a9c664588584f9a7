"""Let each element of a union compute for itself what it makes of tensors alone.

Where a conversion changes nothing, such as that of a ``float32`` weight to ``float32``, torch gives the weight itself,
and the tracer takes whatever reads that weight later for a reader of the conversion. With a weight that several
elements hold, one of them then reads a value of another, whose inputs a call of it does not have.
"""

from __future__ import annotations

from collections.abc import Collection

from torch import fx

from graftc.passes.core.elements.calls import elements_in, innermost
from graftc.passes.core.ir.new_nodes import copy_node
from graftc.passes.core.ir.program import Program, is_random, mutates


def separate(program: Program) -> None:
    """Compute anew, in each element that reads it, what another element has made of tensors alone.

    Args:
        program: of a union of elements, which is changed; a Program of a model's own stays as it is.
    """
    elements = frozenset(elements_in(program.flags))
    if not elements:
        return
    settled: set[fx.Node] = set()
    copies: dict[tuple[str, fx.Node], fx.Node] = {}
    for node in list(program.graph.nodes):
        sources = node.all_input_nodes
        computed = node.op == "call_function" and sources and not is_random(node) and not mutates(node)
        if node.op == "get_attr" or (computed and settled.issuperset(sources)):
            settled.add(node)
        home = _home(node, elements)
        others = {s for s in sources if s in settled and s.op != "get_attr" and _home(s, elements) not in ("", home)}
        for source in others if home else ():
            node.replace_input_with(source, _copied(program, source, home, node, copies))


def _home(node: fx.Node, elements: Collection[str]) -> str:
    """Return the innermost element that computes a node; empty where none does."""
    return innermost(str(node.meta.get("module", "")), elements) if node.op == "call_function" else ""


def _copied(
    program: Program, source: fx.Node, home: str, reader: fx.Node, copies: dict[tuple[str, fx.Node], fx.Node]
) -> fx.Node:
    """A value of tensors alone as an element's own, before the first of its readers there."""
    if source.op == "get_attr":
        return source
    if (home, source) not in copies:
        values = {s: _copied(program, s, home, reader, copies) for s in source.all_input_nodes}
        with program.graph.inserting_before(reader):
            copied = copy_node(program.graph, source, values.__getitem__, source.name)
        copied.meta = {**source.meta, "module": str(reader.meta.get("module", ""))}
        copies[home, source] = copied
    return copies[home, source]
