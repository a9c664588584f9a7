"""Outline the repeated layers of a Program: one subgraph per layer and use, called from a short root graph.

A layer is identified by a node's module path up to the first numbered segment. Its subgraph names tensors relative to
the layer and values by position, so identical layers have identical code.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

import torch
from torch import fx

from graftc.passes.core.elements.calls import elements_in, innermost
from graftc.passes.core.ir.cleaning import live
from graftc.passes.core.ir.effects import Memory
from graftc.passes.core.ir.functions import FunctionCall, UnlikeBodyError, call, region
from graftc.passes.core.ir.layers import layer_path, repeated_layers
from graftc.passes.core.ir.new_nodes import copy_node
from graftc.passes.core.ir.program import Program, is_random, provenance
from graftc.passes.core.worklist import Worklist


@dataclass(frozen=True)
class BlockGraph:
    """The part of a Program that belongs to one call of a layer.

    Attributes:
        path: the module path of the layer; names of its tensors are relative to it.
        use: the number of this call of the layer, 0 for the first.
        graph: the subgraph; its inputs are the values that the layer reads from outside, its outputs those that others
            read from it.
        inputs, outputs: the names of these values in the Program.
    """

    path: str
    use: int
    graph: fx.Graph
    inputs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Outlined:
    """A root graph whose ``call_module`` nodes call the blocks with the arguments ``(use, *inputs)``."""

    root: fx.Graph
    blocks: tuple[BlockGraph, ...]


def outline(program: Program) -> Outlined:
    """Split a Program into its layers; the Program itself is not changed."""
    groups, needed = _group(program), live(program)
    uses: dict[str, int] = defaultdict(int)
    blocks: list[BlockGraph] = []
    root = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    attributes: dict[str, fx.Node] = {}

    def value(node: fx.Node) -> fx.Node:
        if node.op == "get_attr":
            name = str(node.target)
            if name not in attributes:
                attributes[name] = root.get_attr(name)
            return attributes[name]
        return mapping[node]

    def enter(block: BlockGraph, inputs: list[fx.Node], results: Mapping[int, fx.Node]) -> None:
        """Call a block in the root graph, and map the nodes of its results to nodes of that graph."""
        uses[block.path] += 1
        blocks.append(block)
        values = root.call_module(block.path, (block.use, *map(value, inputs)))
        single = len(block.outputs) == 1
        for index, node in results.items():
            mapping[node] = values if single else root.call_function(operator.getitem, (values, index))

    written: Written = {}
    checked: set[str] = set()
    for path, nodes in groups:
        if path:
            written[path] = block, inputs, outputs = _block(path, uses[path], nodes, needed)
            enter(block, inputs, dict(enumerate(outputs)))
            continue
        for node in nodes:
            if node.target is call:
                one = FunctionCall(node)
                if one.body not in checked:
                    _require_one_block(one, written, uses)
                    checked.add(one.body)
                enter(*_called(one, uses[one.path], *written[one.body]))
            elif node.op != "get_attr" and node not in mapping:
                mapping[node] = copy_node(root, node, value)
    return Outlined(root, tuple(blocks))


Written = dict[str, tuple[BlockGraph, list[fx.Node], list[fx.Node]]]
"""Blocks that have been written out, together with the nodes that they read and return, by path."""


def _require_one_block(one: FunctionCall, written: Written, uses: Mapping[str, int]) -> None:
    """Check that the body of a call is one block that reads and returns the values that calls name.

    Raises:
        UnlikeBodyError: if it is not.
    """
    if uses[one.body] != 1:
        raise UnlikeBodyError(f"{one.body} is not one block")
    _, inputs, outputs = written[one.body]
    if set(region(set(one.given), one.body_results, one.body)).intersection(inputs) or not set(one.body_results) <= set(
        outputs
    ):
        raise UnlikeBodyError(f"{one.body} is computed in several places")


def _called(
    one: FunctionCall, use: int, block: BlockGraph, inputs: list[fx.Node], outputs: list[fx.Node]
) -> tuple[BlockGraph, list[fx.Node], dict[int, fx.Node]]:
    """Return the block of a call, which shares the graph of the body's block.

    Also return the nodes that the call reads, and the nodes that select its results, by index.
    """
    given, body_results = dict(zip(one.given, one.inputs, strict=True)), one.body_results
    read = [given.get(node, node) for node in inputs]
    results = {outputs.index(body_results[index]): node for node, index in one.results.items()}
    named = [next((node.name for at, node in results.items() if at == place), "") for place in range(len(outputs))]
    names = tuple(n.name for n in read)
    return replace(block, path=one.path, use=use, inputs=names, outputs=tuple(named)), read, results


Group = tuple[str, list[fx.Node]]


def _group(program: Program) -> list[Group]:
    """Return the nodes as consecutive runs, each belonging to one layer or to none.

    A node that belongs to no layer and does not depend on the current one goes before that layer, unless it has to keep
    its place (see `_Order`).
    """
    homes, order = Homes(program), _Order(program)
    done: list[Group] = []
    run: list[fx.Node] = []
    waiting: list[fx.Node] = []
    current = ""

    def close() -> None:
        nonlocal run, waiting
        if run:
            done.append((current, run))
        if waiting:
            done.append(("", waiting))
        run, waiting = [], []

    for node in _ordered(program, homes, order):
        path = homes.of(node) if node.op == "call_function" else ""
        sources = set(node.all_input_nodes)
        if waiting and path and path == current and (taken := _inserted_between(sources, run, waiting, order)):
            run += taken
            gone = set(taken)
            waiting = [other for other in waiting if other not in gone]
        if path and (path != current or sources.intersection(waiting) or order.must_follow(node, waiting)):
            close()
            current = path
        if path:
            run.append(node)
        elif run and (order.keeps_place(node) or sources.intersection([*run, *waiting])):
            waiting.append(node)
        else:
            if not done or done[-1][0]:
                done.append(("", []))
            done[-1][1].append(node)
    close()
    return done


class _Order:
    """The nodes of a Program that must run in the Program's order.

    They draw random numbers, call a Function, write to memory, or read memory that is written to.
    """

    def __init__(self, program: Program) -> None:
        self._memory = Memory(program.graph)

    def keeps_place(self, node: fx.Node) -> bool:
        """Return whether a node must run in order."""
        if is_random(node) or node.target is call:
            return True
        return bool(self._memory.writes) and not self._memory.settled(node, *node.all_input_nodes)

    def must_follow(self, node: fx.Node, waiting: list[fx.Node]) -> bool:
        """Return whether a node must not run before the waiting nodes."""
        return bool(waiting) and self.keeps_place(node) and any(map(self.keeps_place, waiting))


def _inserted_between(
    sources: set[fx.Node], run: list[fx.Node], waiting: list[fx.Node], order: _Order
) -> list[fx.Node]:
    """Return the waiting nodes that become part of the current layer although they belong to none.

    They are computed from nodes that adaptations have inserted in that layer, which in turn reads them: a mask over a
    prefix, for example. The layer is thus called exactly as often as in the source.
    """
    inside, known = set(run), set(waiting)
    nodes = Worklist(known.intersection(sources))
    for node in nodes:
        nodes += known.intersection(node.all_input_nodes)
    between = nodes.visited
    own = (source for node in between for source in node.all_input_nodes if source in inside)
    moves = all(map(provenance, own)) and not any(map(order.keeps_place, between))
    return [node for node in waiting if node in between] if moves else []


def _ordered(program: Program, homes: Homes, order: _Order) -> list[fx.Node]:
    """Return all nodes except tensors, in order.

    Nodes that a layer's adaptations compute from tensors alone, or from values computed outside the layer, come right
    before their first reader. If they came before all layers, they would form a separate call to their layer, but a
    layer must be called exactly as often as in the source.
    """
    ordered: list[fx.Node] = []
    settled: set[fx.Node] = set()
    waiting: set[fx.Node] = set()

    def place(node: fx.Node) -> None:
        for source in node.all_input_nodes:
            if source in waiting:
                waiting.remove(source)
                place(source)
        ordered.append(node)

    needed = live(program)
    for node in program.graph.nodes:
        if node.op == "get_attr" or node not in needed:
            continue
        path = homes.of(node)
        if provenance(node) is not None and all(n.op == "get_attr" or n in settled for n in node.all_input_nodes):
            settled.add(node)
            if path:
                waiting.add(node)
                continue
        moves = path and _may_wait(node, homes, order)
        if moves and all(n in waiting or homes.computing(n) != path for n in node.all_input_nodes):
            waiting.add(node)
        else:
            place(node)
    return ordered


class Homes:
    """The layers that nodes belong to: repeated layers, or, in a union of elements, the innermost element.

    Args:
        program: the Program that contains the nodes.
    """

    def __init__(self, program: Program) -> None:
        self._elements = frozenset(elements_in(program.flags))
        self._layers = self._elements or frozenset(repeated_layers(program))
        self._known: dict[str, str] = {}

    def of(self, node: fx.Node) -> str:
        """Return the path of the layer that a node belongs to; empty if it belongs to none."""
        module = str(node.meta.get("module", ""))
        if module not in self._known:
            self._known[module] = innermost(module, self._elements) if self._elements else layer_path(module)
        path = self._known[module]
        return path if path in self._layers else ""

    def computing(self, node: fx.Node) -> str:
        """Return the path of the layer that computes a value; empty if none does."""
        return self.of(node) if node.op == "call_function" else ""


def _may_wait(node: fx.Node, homes: Homes, order: _Order) -> bool:
    """Return whether an adaptation's node is read only by its layer and gives the same result wherever it runs.

    It must not draw random numbers, write to memory, or read memory that is written to.
    """
    if provenance(node) is None or not node.users or not isinstance(node.target, torch._ops.OpOverload):
        return False
    return not order.keeps_place(node) and all(homes.computing(user) == homes.computing(node) for user in node.users)


def _block(
    path: str, use: int, nodes: list[fx.Node], needed: Collection[fx.Node]
) -> tuple[BlockGraph, list[fx.Node], list[fx.Node]]:
    inside = set(nodes)
    prefix = path + "."
    read = dict.fromkeys(source for node in nodes for source in node.all_input_nodes if source not in inside)
    own = [source for source in read if source.op == "get_attr" and str(source.target).startswith(prefix)]
    inputs = [source for source in read if source not in own]
    outputs = [node for node in nodes if any(user not in inside and user in needed for user in node.users)]
    graph = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    for index, node in enumerate(inputs):
        mapping[node] = graph.create_node("placeholder", f"x{index}", name=f"x{index}")
    for index, node in enumerate(own):
        mapping[node] = graph.create_node("get_attr", str(node.target).removeprefix(prefix), name=f"w{index}")
    for index, node in enumerate(nodes):
        mapping[node] = copy_node(graph, node, mapping.__getitem__, name=f"v{index}")
    results = tuple(mapping[node] for node in outputs)
    graph.output(results[0] if len(results) == 1 else results)
    names = (tuple(node.name for node in values) for values in (inputs, outputs))
    return BlockGraph(path, use, graph, *names), inputs, outputs
