"""What every step did to a graph: how many nodes it added and removed, and which."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
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
        self.graph = graph
        self._before = {node: (node.args, node.kwargs) for node in graph.nodes}

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
        before = self._before
        self._before = now = {node: (node.args, node.kwargs) for node in graph.nodes}
        inserted: list[str] = []
        rewired: dict[str, Reads] = {}
        if graph is self.graph:
            old = before
            erased = [node for node in before if node not in now]
        else:  # nodes are told by name, and all their arguments are compared
            named = {node.name: held for node, held in before.items()}
            old = {node: named[node.name] for node in now if node.name in named}
            kept = {node.name for node in now}
            erased = [node for node in before if node.name not in kept]
        for node, held in now.items():
            known = old.get(node)
            if known is None:
                inserted.append(node.name)
            elif known[0] is not held[0] or known[1] is not held[1]:
                reads = names_read(*known)
                if reads != names_read(*held):
                    rewired[node.name] = reads
        self.graph = graph
        gone = {
            node.name: ErasedNode(node.target, str(node.meta.get("module") or ""), names_read(*before[node]))
            for node in erased
        }
        return Changes(tuple(inserted), gone, rewired)


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
