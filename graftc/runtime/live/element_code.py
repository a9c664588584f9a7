"""The code of a live model's individual elements, extracted from the graph of their union."""

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
        inputs: the names of the tensors that it reads, in order.
        run: ``run(module, *inputs)``, where ``module`` is the root of the tree.
        outputs: the structure of the results, which ``run`` returns flat.
    """

    inputs: tuple[str, ...]
    run: Function
    outputs: OutputSpec


def parts_of(program: Program, root: fx.Graph) -> dict[str, tuple[fx.Graph, OutputSpec]]:
    """Return each element's part of a graph and the structure of its outputs, by path.

    Args:
        program: the Program of a union, whose outputs are a dict of each element's results, by path.
        root: the Program's graph, in which layers may be module calls; not modified.
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
    """Return the part of a graph on which the given results depend."""
    nodes = [node for node in results if isinstance(node, fx.Node)]
    needed = {*nodes, *above(nodes)}
    part, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    for node in root.nodes:
        if node in needed:
            copies[node] = part.node_copy(node, copies.__getitem__)
    part.output(tuple(copies[value] if isinstance(value, fx.Node) else value for value in results))
    return part
