"""What every step did to a graph: how many nodes it added and removed, and which."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import fx

Reads = tuple[tuple[str, str], ...]
"""The values that a node reads, as often as it does: the position of the argument, and the value's name."""


@dataclass(frozen=True)
class ErasedNode:
    """A node that a step removed.

    Attributes:
        target: what it called.
        module: path of the module that it belonged to.
        reads: what it read.
    """

    target: Any
    module: str
    reads: Reads


@dataclass(frozen=True)
class Changes:
    """Which nodes a step changed, by name. From these and the graph after the step follows the graph before it.

    Attributes:
        inserted: new nodes.
        erased: nodes that are gone.
        rewired: nodes that read other values than before, with what they read before.
    """

    inserted: tuple[str, ...] = ()
    erased: Mapping[str, ErasedNode] = field(default_factory=dict)
    rewired: Mapping[str, Reads] = field(default_factory=dict)


@dataclass(frozen=True)
class HistoryEntry:
    """What one step did to a Program.

    Attributes:
        step: its name.
        added, removed: how many nodes.
        seconds: how long it took; 0 where it came from a file.
        changes: which nodes; None where a file does not say.
    """

    step: str
    added: int
    removed: int
    seconds: float
    changes: Changes | None = None

    @property
    def modified(self) -> bool:
        """Whether the step changed the number of nodes either way."""
        return bool(self.added or self.removed)


class Recorder:
    """Remembers a graph as it is, to say later what a step has changed.

    It keeps the arguments of nodes, which fx replaces as a whole whenever one changes, and copies none of them.

    Args:
        graph: before the first step.

    Attributes:
        graph: the graph as of the last step.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self._remember(graph)

    def _remember(self, graph: fx.Graph) -> None:
        self.graph = graph
        self._args: dict[fx.Node, tuple[Any, ...]] = {node: node.args for node in graph.nodes}
        self._kwargs: dict[fx.Node, dict[str, Any]] = {node: node.kwargs for node in graph.nodes if node.kwargs}

    def entry(self, step: str, graph: fx.Graph, seconds: float) -> HistoryEntry:
        """The entry of a step: what has changed since the one before.

        Args:
            step: its name.
            graph: after the step: the same graph, or another one in which nodes that are kept have their names.
            seconds: how long it took.
        """
        changes = self._changes(graph)
        return HistoryEntry(step, len(changes.inserted), len(changes.erased), seconds, changes)

    def _changes(self, graph: fx.Graph) -> Changes:
        if graph is not self.graph:
            return self._changes_of_another(graph)
        known, keywords = self._args, self._kwargs
        inserted: list[str] = []
        rewired: dict[str, Reads] = {}
        count = 0
        for node in graph.nodes:  # most are as they were, and take no more than being looked at
            count += 1
            args, kwargs = node.args, node.kwargs
            before = known.get(node)
            if before is args and (not kwargs or keywords.get(node) is kwargs):
                continue
            if before is None:
                inserted.append(node.name)
            else:
                reads = self._reads(node)
                if reads != names_read(args, kwargs):
                    rewired[node.name] = reads
            known[node] = args
            keywords[node] = kwargs
        erased: dict[str, ErasedNode] = {}
        if len(known) > count:
            kept = set(graph.nodes)
            for node in [node for node in known if node not in kept]:
                erased[node.name] = self._erased(node)
                del known[node]
                keywords.pop(node, None)
        return Changes(tuple(inserted), erased, rewired)

    def _changes_of_another(self, graph: fx.Graph) -> Changes:
        """Nodes are told by name, and all their arguments are compared."""
        named = {node.name: node for node in self._args}
        nodes = {node.name: node for node in graph.nodes}
        before = {name: self._reads(named[name]) for name in nodes if name in named}
        changes = Changes(
            tuple(name for name in nodes if name not in named),
            {name: self._erased(node) for name, node in named.items() if name not in nodes},
            {n: reads for n, reads in before.items() if reads != names_read(nodes[n].args, nodes[n].kwargs)},
        )
        self._remember(graph)
        return changes

    def _reads(self, node: fx.Node) -> Reads:
        """What a node read before."""
        return names_read(self._args[node], self._kwargs.get(node, {}))

    def _erased(self, node: fx.Node) -> ErasedNode:
        return ErasedNode(node.target, str(node.meta.get("module") or ""), self._reads(node))


def names_read(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Reads:
    """The positions and names of the nodes in arguments, as often as they stand there."""
    return tuple((position, node.name) for position, node in positions(args, kwargs))


def positions(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[tuple[str, fx.Node]]:
    """Every node in arguments, as often as it stands there, with its position: the index of the argument, or its
    keyword, with the index in a list after a dot."""
    for index, argument in enumerate(args):
        yield from _within(str(index), argument)
    for name, argument in kwargs.items():
        yield from _within(name, argument)


def _within(position: str, value: Any) -> Iterator[tuple[str, fx.Node]]:
    if isinstance(value, fx.Node):
        yield position, value
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from _within(f"{position}.{index}", item)
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _within(f"{position}.{key}", item)
    elif isinstance(value, slice):
        for name in ("start", "stop", "step"):
            yield from _within(f"{position}.{name}", getattr(value, name))


def map_nodes(value: Any, fn: Callable[[fx.Node], Any]) -> Any:
    """``value`` (arguments of a node) with ``fn`` applied to every node in it."""
    return fx.node.map_arg(value, fn)


def nodes_in(value: Any) -> list[fx.Node]:
    """Every node in ``value`` (arguments of a node), in order, as often as it stands there."""
    found: list[fx.Node] = []

    def note(node: fx.Node) -> fx.Node:
        found.append(node)
        return node

    map_nodes(value, note)
    return found
