"""The history of a graph: how many nodes each step added and removed, and which nodes it changed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import fx

Reads = tuple[tuple[str, str], ...]
"""The values that a node reads, once per occurrence: the argument's position and the value's name."""


@dataclass(frozen=True)
class ErasedNode:
    """A node that a step removed.

    Attributes:
        target: the target that it called.
        module: path of the module to which it belonged.
        reads: the values that it read.
    """

    target: Any
    module: str
    reads: Reads


@dataclass(frozen=True)
class Changes:
    """The nodes that a step changed, by name.

    Together with the graph after the step, they determine the graph before it.

    Attributes:
        inserted: new nodes.
        erased: removed nodes.
        rewired: nodes that now read different values, with the values that they read before.
    """

    inserted: tuple[str, ...] = ()
    erased: Mapping[str, ErasedNode] = field(default_factory=dict)
    rewired: Mapping[str, Reads] = field(default_factory=dict)


@dataclass(frozen=True)
class HistoryEntry:
    """The changes that one step made to a Program.

    Attributes:
        step: the name of the step.
        added, removed: the number of nodes added and removed.
        seconds: the duration of the step; 0 if the entry was read from a file.
        changes: the nodes that changed; None if a file does not contain them.
    """

    step: str
    added: int
    removed: int
    seconds: float
    changes: Changes | None = None


class Recorder:
    """Records the state of a graph, so that the changes made by a step can be determined later.

    It stores references to the nodes' arguments without copying them, since fx replaces them as a whole.

    Args:
        graph: the graph before the first step.

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
        """Return a step's entry, with the changes since the previous step.

        Args:
            step: the name of the step.
            graph: the graph after the step: the same graph, or another one in which surviving nodes have the same
                names.
            seconds: the duration of the step.
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
        for node in graph.nodes:  # most nodes are unchanged, and cost one comparison
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
        """Return the changes in another graph, matching nodes by name and comparing all their arguments."""
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
        """Return the values that a node read as of the last step."""
        return names_read(self._args[node], self._kwargs.get(node, {}))

    def _erased(self, node: fx.Node) -> ErasedNode:
        return ErasedNode(node.target, str(node.meta.get("module") or ""), self._reads(node))


def names_read(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Reads:
    """Return the position and name of every node in arguments, once for each occurrence."""
    return tuple((position, node.name) for position, node in positions(args, kwargs))


def positions(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[tuple[str, fx.Node]]:
    """Yield every node in arguments with its position, once for each occurrence.

    A position is the argument's index or keyword, and for a list also a dot and the index in the list.
    """
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
    """Return ``value`` (a node's arguments) with ``fn`` applied to every node in it."""
    return fx.node.map_arg(value, fn)


def nodes_in(value: Any) -> list[fx.Node]:
    """Return every node in ``value`` (a node's arguments), in order, once for each occurrence."""
    nodes: list[fx.Node] = []
    map_nodes(value, nodes.append)
    return nodes
