"""Program: one graph for one (entry, mode, signature). It refers to Store tensors by name and owns none."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import reduce
from operator import attrgetter, or_
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar, cast

import torch
from torch import fx

from graftc.compat.operators import schema_of
from graftc.passes.core.ir.edits import Edits
from graftc.passes.core.ir.effects import Memory
from graftc.passes.core.ir.history import HistoryEntry
from graftc.passes.core.ir.history import map_nodes as map_nodes
from graftc.passes.core.ir.history import nodes_in as nodes_in
from graftc.passes.core.ir.new_nodes import copy_node
from graftc.passes.core.ir.program_key import Mode
from graftc.passes.core.weights.tensor_edits import TensorEdits
from graftc.records.site_key import SiteKey

if TYPE_CHECKING:
    import networkx as nx

T = TypeVar("T")


@dataclass(frozen=True)
class InputSpec:
    """One input of a Program.

    Attributes:
        name: the model's own name for the input.
        dtype: the dtype, such as ``torch.int64``.
        shape: sizes; a string is a symbol shared by name with other inputs (``"batch"``, ``"sequence"``).
        ranges: the minimum and maximum sizes for which the graph is valid, per axis; empty if not recorded.
        apart: pairs of named sizes that must differ for the graph to be valid.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int | str, ...]
    ranges: tuple[tuple[int, int | None], ...] = ()
    apart: tuple[tuple[str, str], ...] = ()


def from_two(inputs: Iterable[InputSpec], names: Collection[str]) -> tuple[InputSpec, ...]:
    """Return the inputs with the axes in ``names`` restricted to sizes of at least 2."""

    return _bounded(inputs, lambda size, low, high: (max(2, low) if size in names else low, high))


def limited(inputs: Iterable[InputSpec], most: Mapping[str, int]) -> tuple[InputSpec, ...]:
    """Return the inputs with named axes restricted to at most the sizes in ``most``."""

    def bounds(size: int | str, low: int, high: int | None) -> tuple[int, int | None]:
        if not isinstance(size, str) or size not in most:
            return low, high
        return low, most[size] if high is None else min(high, most[size])

    return _bounded(inputs, bounds)


def _bounded(
    inputs: Iterable[InputSpec], bounds: Callable[[int | str, int, int | None], tuple[int, int | None]]
) -> tuple[InputSpec, ...]:
    return tuple(
        replace(spec, ranges=tuple(bounds(size, *limits) for size, limits in zip(spec.shape, spec.ranges, strict=True)))
        for spec in inputs
    )


@dataclass(frozen=True)
class OutputSpec:
    """The structure from which outputs are rebuilt: a leaf, a container, or a ``ModelOutput`` class with fields."""

    kind: Literal["leaf", "none", "tuple", "list", "dict", "class"]
    fields: tuple[str, ...] = ()
    children: tuple[OutputSpec, ...] = ()
    cls: type[Any] | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the flat outputs, in order: field names, numbered if a field contains several outputs."""
        return tuple(_names(self, ""))

    def build(self, leaves: Iterable[Any]) -> Any:
        """Rebuild the model's own output object from flat values."""
        return _built(self, iter(leaves))


def _names(spec: OutputSpec, prefix: str) -> Iterable[str]:
    if spec.kind == "leaf":
        yield prefix or "output"
    for index, child in enumerate(spec.children):
        name = spec.fields[index] if spec.fields else str(index)
        yield from _names(child, f"{prefix}.{name}" if prefix else name)


def _built(spec: OutputSpec, leaves: Any) -> Any:
    if spec.kind == "leaf":
        return next(leaves)
    if spec.kind == "none":
        return None
    values = [_built(child, leaves) for child in spec.children]
    if spec.kind == "tuple":
        return tuple(values)
    if spec.kind == "list":
        return values
    mapping = dict(zip(spec.fields, values, strict=True))
    if spec.kind == "dict":
        return mapping
    assert spec.cls is not None
    output = spec.cls(**mapping)
    if isinstance(output, OrderedDict) and tuple(output) != spec.fields:  # fields set after construction come last
        for name in filter(output.__contains__, spec.fields):
            output.move_to_end(name)
    return output


@dataclass(frozen=True)
class VirtualTokens:
    """An adaptation's virtual tokens in one sequence.

    Attributes:
        owner: the adaptation.
        sites: the values of that sequence that it adapts.
        rows: the vectors of each run, ``[batch, length, width]``: zeros until a method fills them in.
        starts: the position at which each run begins in the lengthened sequence: an integer, or ``int64[batch, 1]``.
    """

    owner: str
    sites: frozenset[SiteKey]
    rows: tuple[fx.Node, ...]
    starts: tuple[fx.Node | int, ...]

    def mapped(self, mapping: Mapping[fx.Node, fx.Node]) -> VirtualTokens:
        """Return the same virtual tokens in a copy of the graph."""
        starts = tuple(mapping[s] if isinstance(s, fx.Node) else s for s in self.starts)
        return replace(self, rows=tuple(mapping[row] for row in self.rows), starts=starts)


@dataclass
class Program:
    """One captured graph in ATen training IR.

    Nodes are ``placeholder``, ``get_attr`` (target: a name in the Store), ``call_function`` and ``output``. Each
    carries ``meta["val"]`` (fake tensor or symbolic size) and ``meta["module"]`` (path of its owning module); inserted
    nodes also carry ``meta["custom"]["graftc"]`` (provenance).
    """

    graph: fx.Graph
    inputs: tuple[InputSpec, ...]
    outputs: OutputSpec
    mode: Mode = "train"
    entry: str = "forward"
    flags: tuple[tuple[str, bool | int | float | str | None], ...] = ()
    """Keyword arguments that are constants of the graph."""

    edits: Edits = field(default_factory=Edits)
    history: list[HistoryEntry] = field(default_factory=list)
    baseline: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    """The base nodes as captured, by name, against which the verifier checks later passes."""

    tensor_edits: TensorEdits = field(default_factory=TensorEdits)
    """How each adaptation uses which rows of stored tensors."""

    limits: dict[str, str] = field(default_factory=dict)
    """The reasons why named axes are limited to smaller sizes than in the base, as text for users."""

    virtual: tuple[VirtualTokens, ...] = ()
    """The virtual tokens in the graph's sequences."""

    updates: frozenset[str] = frozenset()
    """The tensors that the captured graph may write to: buffers of the base, in train mode."""

    checks: tuple[InputCheck, ...] = ()
    """The model's conditions on input values that the graph itself does not express."""

    memory: Memory | None = field(default=None, repr=False, compare=False)
    """The owners of the memory of the graph's values, cached on first request; see `memory_of`."""

    @property
    def signature(self) -> tuple[str, ...]:
        """Names of the inputs, in the model's order."""
        return tuple(spec.name for spec in self.inputs)

    @property
    def output_node(self) -> fx.Node:
        """The graph's output node."""
        return self.graph.output_node()

    def placeholders(self) -> list[fx.Node]:
        """Return the input nodes, in order."""
        return self.graph.find_nodes(op="placeholder")

    def current(self, node: fx.Node, site: str | None = None) -> fx.Node:
        """Return the node that replaces ``node`` after all edits, or ``node`` itself if it has not been replaced.

        Args:
            node: the node that may have been replaced.
            site: a site, as text, whose narrow edits are included; by default no narrow edits are.
        """
        return self.edits.current(node, site)

    def to_networkx(self) -> nx.MultiDiGraph[str]:
        """Return a networkx graph whose nodes are keyed by their printed names; see `graph_formats.to_networkx`."""
        from graftc.passes.core.ir.graph_formats import to_networkx

        return to_networkx(self)

    def copy(self, **changes: Any) -> Program:
        """Return a Program with its own copy of the graph; metadata values and Store tensors are shared."""
        graph = fx.Graph()
        mapping: dict[fx.Node, fx.Node] = {}
        for node in self.graph.nodes:
            copied = mapping[node] = copy_node(graph, node, mapping.__getitem__)
            copied.meta.update(node.meta)
            if "custom" in copied.meta:
                copied.meta["custom"] = dict(copied.meta["custom"])
        fields: dict[str, Any] = {
            "graph": graph,
            "edits": self.edits.mapped(mapping.__getitem__),
            "history": list(self.history),
            "tensor_edits": TensorEdits(self.tensor_edits),
            "limits": dict(self.limits),
            "virtual": tuple(v.mapped(mapping) for v in self.virtual),
            "memory": None,
            **changes,
        }
        return replace(self, **fields)


@dataclass(frozen=True)
class InputCheck:
    """A condition on the inputs of a call; see `graftc.compiler.input_checks`.

    Attributes:
        program: a Program that computes a boolean tensor whose elements must all be true.
        message: the error message for an element that is false.
    """

    program: Program
    message: str


def provenance(node: fx.Node) -> dict[str, str] | None:
    """Return a node's origin (``adaptation``, ``method``, ``site`` and ``part``), or None for the base's own nodes."""
    return cast("dict[str, str] | None", (node.meta.get("custom") or {}).get("graftc"))


def follow(node: fx.Node, links: Mapping[fx.Node, fx.Node]) -> fx.Node:
    """Return the node at the end of a chain of replacements, such as from each edit's *before* to its *after*."""
    while node in links:
        node = links[node]
    return node


def gives_tensors(node: fx.Node) -> bool:
    """Return whether a node's value is a tensor, or several tensors as for a split, rather than a size."""
    value = node.meta.get("val")
    return any(isinstance(each, torch.Tensor) for each in (value if isinstance(value, list | tuple) else (value,)))


def above(
    nodes: Iterable[fx.Node],
    stop: Collection[fx.Node] = (),
    sources: Callable[[fx.Node], Iterable[fx.Node]] = attrgetter("all_input_nodes"),
) -> list[fx.Node]:
    """Return some nodes and everything that they are computed from, in graph order, not going beyond ``stop``.

    Args:
        nodes: the nodes to start from.
        stop: nodes whose sources are not followed.
        sources: a function that returns the sources to follow from a node; by default all nodes that it reads.
    """
    reached = set(nodes)
    pending = [node for node in reached if node not in stop]
    while pending:
        for source in sources(pending.pop()):
            if source not in reached:
                reached.add(source)
                pending += [source] if source not in stop else []
    return sorted(reached)


class ItemsAbove(Generic[T]):
    """Records, for each value of a graph, the items on which it depends.

    Args:
        graph: the graph.
        items: the items, by the nodes to which they belong.
    """

    def __init__(self, graph: fx.Graph, items: Mapping[fx.Node, T]) -> None:
        self._items = tuple(items.values())
        bits = {node: 1 << number for number, node in enumerate(items)}
        self._marks: dict[fx.Node, int] = {}
        for node in graph.nodes:
            sources = (self._marks[source] for source in node.all_input_nodes)
            self._marks[node] = reduce(or_, sources, bits.get(node, 0))

    def of(self, value: fx.Node) -> tuple[T, ...]:
        """Return the items of a value and of everything that it is computed from, in their original order."""
        return self._marked(self._marks[value])

    def inside(self, value: fx.Node, source: fx.Node) -> tuple[T, ...]:
        """Return the items of a value without those that ``source`` depends on as well, in their original order."""
        return self._marked(self._marks[value] & ~self._marks[source])

    def _marked(self, mark: int) -> tuple[T, ...]:
        marked: list[T] = []
        while mark:
            marked.append(self._items[(mark & -mark).bit_length() - 1])
            mark &= mark - 1
        return tuple(marked)


def is_above(node: fx.Node, other: fx.Node) -> bool:
    """Return whether ``node`` is computed from ``other`` or is the same node."""
    return other in above([node], sources=lambda each: [s for s in each.all_input_nodes if not s < other])


def memory_of(program: Program) -> Memory:
    """Return the `Memory` of a Program's graph as of the first request, since adaptations do not write in place."""
    if program.memory is None:
        program.memory = Memory(program.graph)
    return program.memory


def mutates(node: fx.Node) -> bool:
    """Return whether a call changes one of its arguments in place."""
    target = node.target
    return isinstance(target, torch._ops.OpOverload) and schema_of(target).is_mutable


def is_random(node: fx.Node) -> bool:
    """Return whether a call draws random numbers, so that no two such calls may be merged."""
    target = node.target
    return isinstance(target, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded in target.tags
