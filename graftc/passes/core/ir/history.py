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
        graph: before the step.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self._before = {node: (node.args, node.kwargs) for node in graph.nodes}

    def entry(self, step: str, graph: fx.Graph, seconds: float) -> HistoryEntry:
        """The entry of a step.

        Args:
            step: its name.
            graph: after the step: the same graph, or another one in which nodes that are kept have their names.
            seconds: how long it took.
        """
        changes = self._changes(graph)
        return HistoryEntry(step, len(changes.inserted), len(changes.erased), seconds, changes)

    def _changes(self, graph: fx.Graph) -> Changes:
        # Of another graph nodes are told by name, and all their arguments are compared.
        named = {} if any(node in self._before for node in graph.nodes) else {node.name: node for node in self._before}
        kept: set[fx.Node] = set()
        inserted: list[str] = []
        rewired: dict[str, Reads] = {}
        for node in graph.nodes:
            old = named.get(node.name) if named else node if node in self._before else None
            if old is None:
                inserted.append(node.name)
                continue
            kept.add(old)
            args, kwargs = self._before[old]
            if args is not node.args or kwargs is not node.kwargs:
                before = names_read(args, kwargs)
                if before != names_read(node.args, node.kwargs):
                    rewired[node.name] = before
        erased = {
            node.name: ErasedNode(node.target, str(node.meta.get("module") or ""), names_read(*held))
            for node, held in self._before.items()
            if node not in kept
        }
        return Changes(tuple(inserted), erased, rewired)


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
