"""The code of single elements of a live model, out of that of their union."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from graftc.passes.core.ir.codegen import Function
from graftc.passes.core.ir.program import OutputSpec, Program, above


@dataclass(frozen=True)
class ElementCode:
    """What one element runs.

    Attributes:
        inputs: names of the tensors that it reads, in order.
        run: ``run(module, *inputs)``, with the root of the tree.
        outputs: how the flat results are put together.
    """

    inputs: tuple[str, ...]
    run: Function
    outputs: OutputSpec


def parts_of(program: Program, root: fx.Graph) -> dict[str, tuple[fx.Graph, OutputSpec]]:
    """The part of each element, and how its outputs are put together, by path.

    Args:
        program: of a union: its outputs are a dict of what each element gives, by path.
        root: its graph, in which layers may be calls of modules; it stays as it is.
    """
    (output,) = root.find_nodes(op="output")
    results: list[Any] = list(output.args[0])
    found: dict[str, tuple[fx.Graph, OutputSpec]] = {}
    for path, spec in zip(program.outputs.fields, program.outputs.children, strict=True):
        count = len(spec.names)
        own, results = results[:count], results[count:]
        found[path] = _part(root, own), spec
    return found


def _part(root: fx.Graph, results: Sequence[Any]) -> fx.Graph:
    """What leads to some results."""
    nodes = [node for node in results if isinstance(node, fx.Node)]
    needed = {*nodes, *above(nodes)}
    made, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    for node in root.nodes:
        if node in needed:
            copies[node] = made.node_copy(node, copies.__getitem__)
    made.output(tuple(copies[value] if isinstance(value, fx.Node) else value for value in results))
    return made
