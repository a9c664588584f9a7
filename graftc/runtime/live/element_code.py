"""The code of single elements of a live model, extracted from that of their union."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from graftc.passes.core.ir.codegen import Function
from graftc.passes.core.ir.program import OutputSpec, Program, above


@dataclass(frozen=True)
class ElementCode:
    """The code of one element.

    Attributes:
        inputs: names of the tensors that it reads, in order.
        run: ``run(module, *inputs)``, with the root of the tree.
        outputs: the structure of the results, which are flat.
    """

    inputs: tuple[str, ...]
    run: Function
    outputs: OutputSpec


def parts_of(program: Program, root: fx.Graph) -> dict[str, tuple[fx.Graph, OutputSpec]]:
    """Return the part of each element and the structure of its outputs, by path.

    Args:
        program: the Program of a union, whose outputs are a dict of the results of each element, by path.
        root: its graph, in which layers may be calls of modules; unchanged.
    """
    (output,) = root.find_nodes(op="output")
    results: list[Any] = list(output.args[0])
    parts: dict[str, tuple[fx.Graph, OutputSpec]] = {}
    for path, spec in zip(program.outputs.fields, program.outputs.children, strict=True):
        count = len(spec.names)
        part_results, results = results[:count], results[count:]
        parts[path] = _part(root, part_results), spec
    return parts


def _part(root: fx.Graph, results: Sequence[Any]) -> fx.Graph:
    """Return the part of a graph that some results depend on."""
    nodes = [node for node in results if isinstance(node, fx.Node)]
    needed = {*nodes, *above(nodes)}
    part, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    for node in root.nodes:
        if node in needed:
            copies[node] = part.node_copy(node, copies.__getitem__)
    part.output(tuple(copies[value] if isinstance(value, fx.Node) else value for value in results))
    return part
