"""Graphs, their changes, and the steps that made them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge

from graftc.records.fields import INSERTED_AS, INSERTED_BY, GraphMode, Module, PrintedLine, PrintedName
from graftc.specs.errors.text import format_layers
from graftc.specs.records.record import Record, stated


@dataclass(frozen=True)
class GraphNode(Record):
    """A node, or a tensor that nodes read."""

    name: PrintedName

    order: Annotated[int, Ge(0)]
    """Its position in the graph."""

    op: Literal["placeholder", "get_attr", "call_function", "output"]
    """The kind of node; `get_attr` is a tensor."""

    target: str
    """The operator, or the name of the input or tensor."""

    type: str
    """Type of its value, such as `f32[s0, s1, 48]`."""

    module: Module

    text: PrintedLine

    adaptation: str | None
    """The adaptation that inserted it; null for the base's own."""

    method: Annotated[str | None, INSERTED_BY]

    site: str | None
    """The place that it was inserted for."""

    part: Annotated[str | None, INSERTED_AS]


@dataclass(frozen=True)
class GraphEdge(Record, published="EdgeData"):
    """A value that a node reads."""

    source: str
    """Name of what is read."""

    target: str
    """Name of what reads it."""

    position: str
    """Index of the argument, or its keyword, with the index in a list after a dot."""


@dataclass(frozen=True)
class GraphRecord(Record, published="GraphData"):
    """The rewritten graph."""

    text: str
    """Its canonical text."""

    nodes: tuple[GraphNode, ...]
    """Nodes and tensors, in graph order."""

    edges: tuple[GraphEdge, ...]
    """One for every time that a value is read."""


@dataclass(frozen=True)
class DiffChange(Record, published="ChangeData"):
    """One change, and the layers that it was made in."""

    layers: tuple[str, ...]
    """Paths of the layers; an empty path is what stands outside of them."""

    added: Annotated[int, Ge(0)]
    """Nodes added in each of the layers."""

    removed: Annotated[int, Ge(0)]
    """Nodes removed in each of the layers."""

    changed: Annotated[int, Ge(0)]
    """Nodes in each of the layers that have other arguments."""

    lines: tuple[str, ...]
    """A unified diff of canonical text, relative to the layer."""

    @property
    def title(self) -> str:
        """The layers of the change, in words."""
        return layers_title(self.layers)


@dataclass(frozen=True)
class Diff(Record, published="GraphDiffData", behind={"mode": ("added", "removed", "changed")}):
    """The changes from the base's graph to the rewritten one."""

    mode: GraphMode

    changes: tuple[DiffChange, ...]
    """The changes; layers that changed alike share one."""

    @stated
    def added(self) -> Annotated[int, Ge(0)]:
        """Nodes added in all layers."""
        return sum(c.added * len(c.layers) for c in self.changes)

    @stated
    def removed(self) -> Annotated[int, Ge(0)]:
        """Nodes removed in all layers."""
        return sum(c.removed * len(c.layers) for c in self.changes)

    @stated
    def changed(self) -> Annotated[int, Ge(0)]:
        """Nodes with other arguments in all layers."""
        return sum(c.changed * len(c.layers) for c in self.changes)

    def text(self) -> str:
        """Return the diff as text for users; empty if nothing changed."""
        if not self.changes:
            return ""
        lines = [f"{self.mode}: {self.added} nodes added, {self.removed} removed, {self.changed} read other values"]
        for change in self.changes:
            lines += [f"@@ {change.title} @@", *change.lines]
        return "\n".join(lines) + "\n"


@dataclass(frozen=True)
class HistoryRow(Record, published="StepData"):
    """The effect of one step on the graph."""

    step: str
    """Its name."""

    added: Annotated[int, Ge(0)]
    """How many nodes it added."""

    removed: Annotated[int, Ge(0)]
    """How many nodes it removed."""

    nodes: Annotated[int, Ge(0)]
    """How many nodes there are after it."""

    inserted: Annotated[int, Ge(0)]
    """How many of them adaptations inserted."""

    verified: bool
    """Whether the verifier ran on its result."""

    seconds: Annotated[float | None, Ge(0)]
    """How long it took; null where that is not known."""


@dataclass(frozen=True)
class LoweringOutcome(Record, published="OutcomeData"):
    """The outcome of a step of lowering at a site of the training graph."""

    step: str
    """Its name, as in `optimise.off`."""

    place: str
    """The site."""

    done: bool
    """Whether it is computed otherwise."""

    reason: str = ""
    """Why not; empty where it is."""


def layers_title(layers: Sequence[str]) -> str:
    """Return the layers of one stack as text: ``h.0 ... 3: 4 layers alike``."""
    if len(layers) == 1:
        return layers[0] or "outside the layers"
    stack, numbers = layers[0].rpartition(".")[0], [int(layer.rpartition(".")[2]) for layer in layers]
    spans = format_layers(numbers)
    if "," not in spans:
        spans = f"{min(numbers)} ... {max(numbers)}"
    return f"{stack + '.' if stack else ''}{spans}: {len(layers)} layers alike"


def history_columns(rows: tuple[HistoryRow, ...]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Return the column names and lines of a table of `history`; times are included only if any are known."""
    timed = any(row.seconds is not None for row in rows)
    columns = ("step", "added", "removed", "nodes", "inserted", "verified", *(["seconds"] if timed else []))
    lines = []
    for row in rows:
        changes = (f"+{row.added}" if row.added else "", f"-{row.removed}" if row.removed else "")
        seconds = ([f"{row.seconds:.3f}" if row.seconds is not None else ""]) if timed else []
        line = (row.step, *changes, str(row.nodes), str(row.inserted), "yes" if row.verified else "", *seconds)
        lines.append(line)
    return columns, lines


OUTCOME_COLUMNS = ("step", "sites", "outcome", "first")
"""Names of the columns of `outcome_rows`."""


def outcome_rows(outcomes: Iterable[LoweringOutcome]) -> Iterator[tuple[str, str, str, str]]:
    """Yield table lines of the step, the number of sites, their outcome, and the first of them."""
    groups: dict[tuple[str, str], list[str]] = {}
    for outcome in outcomes:
        groups.setdefault((outcome.step, outcome.reason if not outcome.done else ""), []).append(outcome.place)
    for (step, reason), places in groups.items():
        yield step, str(len(places)), f"left as they are: {reason}" if reason else "rewritten", places[0]
