"""Reconstruct a graph at every step of its history: each node and edge once, with the steps between which it exists.

The steps are reconstructed backwards from the final graph, using the record of each step: nodes that it inserted are
removed, nodes that it erased are restored, and nodes that it rewired read their earlier inputs again.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from graftc.compiler.inspect.costs import Costs
from graftc.compiler.inspect.history import history
from graftc.compiler.inspect.snapshot import Snapshot
from graftc.passes.core.ir.history import Changes, Reads, names_read
from graftc.passes.core.ir.printer import Printer, target_name
from graftc.passes.core.ir.program import Program, above, mutates, provenance
from graftc.passes.core.ir.program_key import Mode
from graftc.passes.core.weights.names import module_of
from graftc.records.graphs import HistoryRow

OPERATIONS = ("placeholder", "get_attr", "call_function", "output")
STAYS = -1
"""Value of ``gone`` for nodes and edges that are never removed."""

_ORIGIN = ("adaptation", "site", "part")


@dataclass
class FrameNode:
    """A node, with the range of steps in which it exists.

    Attributes:
        name: the printed name; for a node that a step erased, its name in the fx graph.
        op: the index of its operation in `OPERATIONS`.
        target: the operator, or the name of the input or tensor that it reads.
        type: the type of its value, as text; empty if unknown.
        module: path of the module that it belongs to.
        origin: adaptation, site and part, for an inserted node.
        trainable: whether it reads a tensor that trains.
        flops, value_bytes: cost per token.
        base: whether it is in the earlier graph: the base's own graph, or another graph to compare with.
        unread: whether it remains in the graph although no output depends on it.
        was: operator and type in the earlier graph, if different.
        born, gone: the step from which it exists, and the step at which it is removed.
        order: its position among the nodes.
    """

    name: str
    op: int
    target: str
    type: str = ""
    module: str = ""
    origin: tuple[str, str, str] | None = None
    trainable: bool = False
    flops: float = 0.0
    value_bytes: float = 0.0
    base: bool = False
    unread: bool = False
    was: str = ""
    born: int = 0
    gone: int = STAYS
    order: float = 0.0


@dataclass
class FrameEdge:
    """A value that a node reads, with its argument position; the other attributes are as in `FrameNode`."""

    source: int
    target: int
    position: str
    base: bool = False
    born: int = 0
    gone: int = STAYS


@dataclass
class Frames:
    """A graph at every step.

    Attributes:
        rows: the steps.
        rewired: number of nodes that each step rewired.
        exact: whether every step has a record; if not, nodes get the step of their adaptation, and erased nodes are
            unknown.
        nodes, edges: all nodes and edges that ever existed.
    """

    rows: tuple[HistoryRow, ...]
    rewired: list[int] = field(default_factory=list)
    exact: bool = True
    nodes: list[FrameNode] = field(default_factory=list)
    edges: list[FrameEdge] = field(default_factory=list)

    def at(self, step: int) -> tuple[set[int], set[tuple[int, int, str]]]:
        """Return the nodes and edges that exist after a step."""

        def there(item: FrameNode | FrameEdge) -> bool:
            return item.born <= step and (item.gone == STAYS or step < item.gone)

        nodes = {number for number, node in enumerate(self.nodes) if there(node)}
        return nodes, {(edge.source, edge.target, edge.position) for edge in self.edges if there(edge)}

    def to_json(self, adaptations: Iterable[str]) -> dict[str, Any]:
        """Return the frames as columns, in which texts are indices into a string table.

        Args:
            adaptations: names of the adaptations; an adaptation's number is its position.
        """
        table: dict[str, int] = {}
        numbers = {name: number for number, name in enumerate(adaptations)}

        def text(value: str) -> int:
            return table.setdefault(value, len(table))

        order = sorted(range(len(self.nodes)), key=lambda number: (self.nodes[number].order, number))
        place = {number: index for index, number in enumerate(order)}
        nodes = [self.nodes[number] for number in order]
        columns = {
            "name": [text(n.name) for n in nodes],
            "op": [n.op for n in nodes],
            "target": [text(n.target) for n in nodes],
            "type": [text(n.type) for n in nodes],
            "module": [text(n.module) for n in nodes],
            "adaptation": [-1 if n.origin is None else numbers.get(n.origin[0], -1) for n in nodes],
            "site": [-1 if n.origin is None else text(n.origin[1]) for n in nodes],
            "part": [-1 if n.origin is None else text(n.origin[2]) for n in nodes],
            "trainable": [int(n.trainable) for n in nodes],
            "flops": [n.flops for n in nodes],
            "value_bytes": [n.value_bytes for n in nodes],
            "base": [int(n.base) for n in nodes],
            "unread": [int(n.unread) for n in nodes],
            "was": [text(n.was) if n.was else -1 for n in nodes],
            "born": [n.born for n in nodes],
            "gone": [n.gone for n in nodes],
        }
        edges = {
            "source": [place[e.source] for e in self.edges],
            "target": [place[e.target] for e in self.edges],
            "position": [text(e.position) for e in self.edges],
            "base": [int(e.base) for e in self.edges],
            "born": [e.born for e in self.edges],
            "gone": [e.gone for e in self.edges],
        }
        frames = [{**row.to_json(), "rewired": count} for row, count in zip(self.rows, self.rewired, strict=True)]
        return {"strings": list(table), "nodes": columns, "edges": edges, "frames": frames, "exact": self.exact}


def frames(snapshot: Snapshot, mode: Mode = "eval", before: Program | None = None) -> Frames:
    """Return a mode's adapted graph at every step, together with the earlier graph.

    Args:
        snapshot: the Compilation.
        mode: the mode of the Program.
        before: the graph to compare with; by default the base's own.
    """
    builder = _Making(snapshot.program(mode), Frames(history(snapshot, mode)), snapshot)
    builder.rewind()
    builder.add_before(snapshot.program(mode, base=True) if before is None else before)
    return builder.frames


def plain_frames(snapshot: Snapshot, mode: Mode = "eval") -> Frames:
    """Return the base's own graph in a mode, without steps."""
    program = snapshot.program(mode, base=True)
    plain = _Making(program, Frames(()), snapshot).frames
    for node in plain.nodes:
        node.base = True
    for edge in plain.edges:
        edge.base = True
    return plain


class _Making:
    """Builds `Frames` backwards from the final graph."""

    def __init__(self, program: Program, frames: Frames, snapshot: Snapshot) -> None:
        self.program, self.frames, self.snapshot = program, frames, snapshot
        self._now: dict[str, int] = {}  # nodes at the step reached so far, by name
        self._reading: dict[int, dict[tuple[str, int], int]] = {}  # edges by reading node
        printer, costs = Printer(program), Costs(program)
        for order, node in enumerate(program.graph.nodes):
            self._now[node.name] = self._add(self._node(node, printer, costs, float(order)))
        for node in program.graph.nodes:
            self._read(self._now[node.name], names_read(node.args, node.kwargs), STAYS)
        needed = {node.name for node in above([program.output_node, *filter(mutates, program.graph.nodes)])}
        for node in program.graph.nodes:
            frames.nodes[self._now[node.name]].unread = node.op != "placeholder" and node.name not in needed

    def _node(self, node: fx.Node, printer: Printer, costs: Costs, order: float) -> FrameNode:
        origin = provenance(node)
        output, tensor = node.op == "output", node.op == "get_attr"
        record = self.snapshot.adapters.get(str(node.target)) if tensor else None
        return FrameNode(
            "output" if output else printer.names[node],
            OPERATIONS.index(node.op),
            "output" if output else str(node.target) if tensor else target_name(node.target),
            "" if output else printer.symbols.type(node.meta.get("val")),
            module_of(str(node.target)) if tensor else str(node.meta.get("module") or ""),
            None if origin is None else (origin["adaptation"], origin["site"], origin["part"]),
            record is not None and record.trainable,
            costs.flops(node),
            costs.value_bytes(node),
            order=order,
        )

    def _add(self, node: FrameNode) -> int:
        self.frames.nodes.append(node)
        self._reading[len(self.frames.nodes) - 1] = {}
        return len(self.frames.nodes) - 1

    def _read(self, reader: int, reads: Reads, gone: int) -> None:
        """Add edges, which exist until step ``gone``, for the values that a node reads."""
        for position, name in reads:
            source = self._now.get(name)
            if source is None:  # the source was inserted and erased within one step
                continue
            self._reading[reader][position, source] = len(self.frames.edges)
            self.frames.edges.append(FrameEdge(source, reader, position, gone=gone))

    def rewind(self) -> None:
        """Undo all steps, from the last to the first."""
        rows = self.frames.rows
        entries = [entry for entry in self.program.history if entry.step != "verify"]
        recorded = [None, *(entry.changes for entry in entries)]  # the first row is the capture
        self.frames.rewired = [len(changes.rewired) if changes else 0 for changes in recorded]
        self.frames.exact = all(changes is not None for changes in recorded[1:])
        if not self.frames.exact:
            self._by_provenance()
            return
        for step in range(len(rows) - 1, 0, -1):
            changes = recorded[step]
            assert changes is not None
            self._undo(step, changes)

    def _undo(self, step: int, changes: Changes) -> None:
        nodes, edges = self.frames.nodes, self.frames.edges
        for name in changes.inserted:
            number = self._now.pop(name, None)
            if number is not None:
                nodes[number].born = step
                for edge in self._reading[number].values():
                    edges[edge].born = step
        for name, erased in changes.erased.items():
            target = target_name(erased.target)
            op = "call_function" if erased.reads or "." in target else "get_attr"
            self._now[name] = self._add(
                FrameNode(f"%{name}", OPERATIONS.index(op), target, module=erased.module, gone=step)
            )
        for name, erased in changes.erased.items():
            self._read(self._now[name], erased.reads, step)
            read = [nodes[edges[edge].source].order for edge in self._reading[self._now[name]].values()]
            nodes[self._now[name]].order = max(read, default=0.0) + 0.5
        for name, before in changes.rewired.items():
            number = self._now.get(name)
            if number is None:
                continue
            old = {(position, self._now[source]) for position, source in before if source in self._now}
            reading = self._reading[number]
            for key in [key for key in reading if key not in old]:
                edges[reading.pop(key)].born = step
            self._read(number, tuple((p, n) for p, n in before if (p, self._now.get(n)) not in reading), step)

    def _by_provenance(self) -> None:
        """Assign steps without using records: inserted nodes appear at the step of their adaptation."""
        steps = {row.step: number for number, row in enumerate(self.frames.rows)}
        nodes = self.frames.nodes
        for node in nodes:
            if node.origin is not None:
                node.born = steps.get(f"insert({node.origin[0]})", len(self.frames.rows) - 1)
        for edge in self.frames.edges:
            edge.born = max(nodes[edge.source].born, nodes[edge.target].born)

    def add_before(self, before: Program) -> None:
        """Mark the nodes and edges of the earlier graph, and add those that are missing from every step."""
        nodes, never = self.frames.nodes, len(self.frames.rows)
        last = {node.name: number for number, node in enumerate(self.program.graph.nodes)}
        earlier = {node.name[1:]: number for number, node in enumerate(nodes) if node.gone != STAYS}
        printer, costs = Printer(before), Costs(before)
        numbers: dict[str, int] = {}
        order = 0.0
        for node in before.graph.nodes:
            own = self._node(node, printer, costs, order + 0.25)
            number = last.get(node.name)
            if number is not None and nodes[number].origin != own.origin:  # a different node with that name
                number = None
            number = earlier.get(node.name) if number is None else number
            if number is None:
                number = self._add(own)
                nodes[number].born = never
            entry = nodes[number]
            entry.base, order = True, max(order, entry.order)
            if not entry.type:
                entry.name, entry.type = own.name, own.type
            if (entry.target, entry.type) != (own.target, own.type):
                entry.was = f"{own.target}: {own.type}"
            numbers[node.name] = number
        known = {(edge.source, edge.target, edge.position): edge for edge in self.frames.edges}
        for node in before.graph.nodes:
            for position, name in names_read(node.args, node.kwargs):
                key = (numbers[name], numbers[node.name], position)
                if key not in known:
                    known[key] = FrameEdge(*key, born=never)
                    self.frames.edges.append(known[key])
                known[key].base = True
