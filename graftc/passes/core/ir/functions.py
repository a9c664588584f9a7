"""Functions: a repeated layer is written out once in the graph, and the identical layers call it.

The body of a function is a part of the graph: the nodes between its `given` values and its `body_results`. A call
represents the same computation on other values, with the tensors of another module. The first, the second and the last
layer of a stack are written out, since a layer may depend on its neighbours; the second one is the body that the layers
in between call.

`inlined` writes out every call.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from torch import fx

from graftc.passes.core.ir.history import Changes, HistoryEntry, Reads
from graftc.passes.core.ir.new_nodes import copy_node
from graftc.passes.core.ir.program import Program, above


class UnlikeBodyError(Exception):
    """Raised if the layers that call a function have to be written out.

    Either such a layer must differ from the function's body, or a request cannot be fulfilled with calls.
    """


def call(path: str, body: str, inputs: Sequence[Any], given: Sequence[Any], results: Sequence[Any]) -> list[Any]:
    """Represent a function call as the target of a node; the returned values have only the right shapes and dtypes.

    Args:
        path: path of the module whose tensors the call reads.
        body: path of the module whose layer is written out.
        inputs: input values of the call.
        given, results: input values of the body, and its results.
    """
    return list(results)


@dataclass(frozen=True)
class FunctionCall:
    """A node that calls a function; see `call`."""

    node: fx.Node

    @property
    def path(self) -> str:
        """The path of the module whose tensors the call reads."""
        return str(self.node.args[0])

    @property
    def body(self) -> str:
        """The path of the module whose layer is written out."""
        return str(self.node.args[1])

    @property
    def inputs(self) -> list[fx.Node]:
        """The call's input values."""
        return list(self.node.args[2])  # type: ignore[arg-type]

    @property
    def given(self) -> list[fx.Node]:
        """The body's input values."""
        return list(self.node.args[3])  # type: ignore[arg-type]

    @property
    def body_results(self) -> list[fx.Node]:
        """The body's result values."""
        return list(self.node.args[4])  # type: ignore[arg-type]

    @property
    def results(self) -> dict[fx.Node, int]:
        """The nodes that pick results of the call, each with its index among the body's results."""
        return {user: int(user.args[1]) for user in self.node.users}  # type: ignore[arg-type]


def calls(graph: fx.Graph) -> list[FunctionCall]:
    """Return a graph's function calls, in order."""
    return [FunctionCall(node) for node in graph.find_nodes(op="call_function", target=call)]


def is_sound(one: FunctionCall) -> bool:
    """Return whether a call is well-formed, which is not guaranteed for a call read from a file."""
    args = one.node.args
    if len(args) != 5 or one.node.kwargs or not all(type(text) is str and text for text in args[:2]):
        return False
    lists = [list(arg) if isinstance(arg, list | tuple) else [None] for arg in args[2:]]
    nodes = all(isinstance(node, fx.Node) for values in lists for node in values)
    picked = all(
        user.target is operator.getitem
        and len(user.args) == 2
        and type(user.args[1]) is int
        and 0 <= user.args[1] < len(lists[2])
        for user in one.node.users
    )
    return nodes and picked and len(lists[0]) == len(lists[1])


def renamed(name: str, before: str, after: str) -> str:
    """Return a module or tensor path with the layer ``before`` replaced by ``after``; other paths are unchanged."""
    return after + name[len(before) :] if is_within(name, before) else name


def is_within(name: str, layer: str) -> bool:
    """Return whether a path is a layer's own path or lies within the layer."""
    return name == layer or name.startswith(f"{layer}.")


def region(
    given: Collection[fx.Node], results: Sequence[fx.Node], body: str, writes: Collection[fx.Node] = ()
) -> list[fx.Node]:
    """Return the nodes that a function's body computes, in graph order.

    These are the nodes above the body's results that belong to its layer, or depend on its inputs or on its own
    tensors. Tensors are not included.

    Args:
        given, results: input values of the body, and its results.
        body: path of its layer.
        writes: nodes that change values in place. Those in the layer belong to the body even if no result depends on
            them.
    """
    computed: dict[fx.Node, None] = {}
    for node in above([*results, *(w for w in writes if in_layer(w, body))], stop=given):
        own = (s in computed or s in given or (s.op == "get_attr" and _is_own(s, body)) for s in node.all_input_nodes)
        if node not in given and node.op == "call_function" and (in_layer(node, body) or any(own)):
            computed[node] = None
    return list(computed)


class Bodies:
    """The bodies that a graph's calls refer to, each analysed once.

    Args:
        writes: nodes that change values in place; see `region`.
    """

    def __init__(self, writes: Collection[fx.Node] = ()) -> None:
        self._writes = writes
        self._regions: dict[tuple[Any, ...], list[fx.Node]] = {}
        self._tensors: dict[tuple[Any, ...], list[str]] = {}

    def region(self, one: FunctionCall) -> list[fx.Node]:
        """Return the nodes that a call's body computes; see the function `region`."""
        key = _body_key(one)
        if key not in self._regions:
            self._regions[key] = region(set(one.given), one.body_results, one.body, self._writes)
        return self._regions[key]

    def tensors(self, one: FunctionCall) -> list[str]:
        """Return the names of the tensors that a call reads in place of the body's own tensors."""
        key = _body_key(one)
        if key not in self._tensors:
            read = (source for node in self.region(one) for source in node.all_input_nodes if source.op == "get_attr")
            own = dict.fromkeys(str(source.target) for source in read if _is_own(source, one.body))
            self._tensors[key] = list(own)
        return [renamed(name, one.body, one.path) for name in self._tensors[key]]


def _body_key(one: FunctionCall) -> tuple[Any, ...]:
    return one.body, *one.given, *one.body_results


def _is_own(attribute: fx.Node, body: str) -> bool:
    return str(attribute.target).startswith(f"{body}.")


def in_layer(node: fx.Node, body: str) -> bool:
    """Return whether a node belongs to a layer (or any other module) or to a submodule of it."""
    return is_within(str(node.meta.get("module") or ""), body)


@dataclass
class _Attributes:
    """The nodes that read a graph's tensors, by tensor name.

    A call's tensors come after the body's, in the same order, and after those of sibling layers with lower numbers.
    """

    graph: fx.Graph
    nodes: dict[str, fx.Node] = field(init=False)
    _last: dict[tuple[str, fx.Node], fx.Node] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.nodes = {str(node.target): node for node in self.graph.find_nodes(op="get_attr")}

    def add(self, body: str, path: str) -> None:
        """Add nodes that read another layer's tensors, in the order in which the body's tensors are read."""
        own = [node for node in self.nodes.values() if _is_own(node, body)]
        for run in _runs(own):
            last = self._behind_lower(self._last.get((body, run[-1]), run[-1]), path)
            for node in run:
                name = renamed(str(node.target), body, path)
                if name in self.nodes:
                    continue
                with self.graph.inserting_after(last):
                    last = self.graph.create_node("get_attr", name, name=name)
                last.meta = moved_meta(node, body, path)
                self.nodes[name] = last
            self._last[body, run[-1]] = last

    def _behind_lower(self, last: fx.Node, path: str) -> fx.Node:
        """Return the last tensor node after ``last`` that belongs to a sibling layer with a lower number."""
        row, _, number = path.rpartition(".")
        while number.isdecimal() and last.next.op == "get_attr":
            own, _, _ = str(last.next.target).removeprefix(f"{row}.").partition(".")
            beside = str(last.next.target).startswith(f"{row}.") and own.isdecimal()
            if not beside or int(own) >= int(number):
                break
            last = last.next
        return last


def _runs(nodes: Sequence[fx.Node]) -> Iterator[list[fx.Node]]:
    """Yield the groups of adjacent nodes among ``nodes``, which are in graph order."""
    run: list[fx.Node] = []
    for node in nodes:
        if run and node.prev is not run[-1]:
            yield run
            run = []
        run.append(node)
    if run:
        yield run


def moved_meta(node: fx.Node, body: str, path: str) -> dict[str, Any]:
    """Return a node's metadata, adjusted for its copy in another layer."""
    meta = {**node.meta, "module": renamed(str(node.meta.get("module", "")), body, path)}
    if (custom := meta.get("custom")) is not None:
        origin = dict(custom["graftc"])
        origin["site"] = renamed(origin["site"], body, path)
        meta["custom"] = {**custom, "graftc": origin}
    return meta


def expand(
    graph: fx.Graph, chosen: Collection[fx.Node] | None = None, writes: Collection[fx.Node] = ()
) -> dict[fx.Node, dict[fx.Node, fx.Node]]:
    """Write out calls in place.

    Args:
        graph: the graph, which is changed in place.
        chosen: nodes of the calls to write out; by default, all of them.
        writes: nodes that change values in place; see `region`.

    Returns:
        For each call, a mapping from the body's nodes to the nodes that replace them in that call.
    """
    attributes = _Attributes(graph)
    bodies = Bodies(writes)
    replacements: dict[fx.Node, dict[fx.Node, fx.Node]] = {}
    for one in calls(graph):
        if chosen is not None and one.node not in chosen:
            continue
        given, body_values, body, path = one.given, one.body_results, one.body, one.path
        inside = bodies.region(one)
        attributes.add(body, path)
        copies: dict[fx.Node, fx.Node] = dict(zip(given, one.inputs, strict=True))

        def copied(source: fx.Node, copies: dict[fx.Node, fx.Node] = copies, at: tuple[str, str] = (body, path)) -> Any:
            if source in copies:
                return copies[source]
            return attributes.nodes[renamed(str(source.target), *at)] if source.op == "get_attr" else source

        with graph.inserting_before(one.node):
            for node in inside:
                new = copies[node] = copy_node(graph, node, copied)
                new.meta = moved_meta(node, body, path)
        for user, index in one.results.items():
            user.replace_all_uses_with(copied(body_values[index]))
            graph.erase_node(user)
        replacements[one.node] = copies
        graph.erase_node(one.node)
    return replacements


def inlined(program: Program) -> Program:
    """Return a Program with every call written out, or the same Program if it has no calls."""
    if not calls(program.graph):
        return program
    if program.edits:
        raise ValueError(
            "the calls of an adapted Program cannot be written out: adapt a Program whose layers are written out"
        )
    flat = program.copy()
    order = [(one.node, one.body, one.path, set(one.given)) for one in calls(flat.graph)]
    replacements = expand(flat.graph)
    for node, body, path, given in order:
        read = {before.name: after.name for before, after in replacements[node].items()}
        copied = {before.name: after.name for before, after in replacements[node].items() if before not in given}
        flat.history = [_repeated(entry, read, copied, Layers(body, path)) for entry in flat.history]
    return flat


class Layers(NamedTuple):
    """The paths of two identical layers: the body and a call."""

    body: str
    call: str


def _repeated(entry: HistoryEntry, read: Mapping[str, str], copied: Mapping[str, str], at: Layers) -> HistoryEntry:
    """Return a step's history entry with its changes to the body repeated in the layer of a call."""
    if entry.changes is None:
        return entry
    changes, (body, path) = entry.changes, at
    erased = {n: e for n, e in changes.erased.items() if is_within(e.module, body)}
    names = {**{name: f"{name}_in_{path.replace('.', '_')}" for name in erased}, **read}

    def reads(before: Reads) -> Reads:
        return tuple((position, names.get(name, name)) for position, name in before)

    moved = {
        names[name]: replace(e, module=renamed(e.module, body, path), reads=reads(e.reads))
        for name, e in erased.items()
    }
    inserted = tuple(copied[name] for name in changes.inserted if name in copied)
    rewired = {copied[name]: reads(before) for name, before in changes.rewired.items() if name in copied}
    merged = Changes((*changes.inserted, *inserted), {**changes.erased, **moved}, {**changes.rewired, **rewired})
    return replace(entry, added=entry.added + len(inserted), removed=entry.removed + len(moved), changes=merged)


def split(program: Program, groups: Mapping[str, Sequence[Sequence[str]]]) -> Program:
    """Return a Program with more bodies, for layers that will differ.

    Args:
        program: the Program to split, which is not changed.
        groups: for each body, groups of layers (as paths) that stay identical; the first group is the body's own.
            The first layer of every other group becomes the body for the rest of its group.
    """
    result = program.copy()
    nodes = {one.path: one.node for one in calls(result.graph)}
    for _, *others in groups.values():
        for path, *rest in others:
            one = FunctionCall(nodes[path])
            results, inputs = one.body_results, one.inputs
            copies = expand(result.graph, {one.node})[one.node]
            for other in rest:
                node = nodes[other]
                node.args = (other, path, node.args[2], inputs, [copies[each] for each in results])
    return result


def prune(graph: fx.Graph) -> None:
    """Reduce bodies to the results that some call uses, and to the inputs that some call replaces with others."""
    bodies: dict[tuple[Any, ...], list[FunctionCall]] = {}
    for one in calls(graph):
        bodies.setdefault((one.body, *one.body_results), []).append(one)
    for group in bodies.values():
        differs = [any(a is not b for a, b in pairs) for pairs in zip(*map(_pairs, group), strict=True)]
        for one in group:
            kept = [pair for pair, varies in zip(_pairs(one), differs, strict=True) if varies]
            given, inputs = [a for a, _ in kept], [b for _, b in kept]
            one.node.args = (one.path, one.body, inputs, given, one.body_results)
        used = sorted({index for one in group for index in one.results.values()})
        if len(used) == len(group[0].body_results):
            continue
        for one in group:
            results, body_values = one.results, one.body_results
            one.node.args = (one.path, one.body, one.inputs, one.given, [body_values[index] for index in used])
            one.node.meta["val"] = [one.node.meta["val"][index] for index in used]
            for user, index in results.items():
                user.args = (one.node, used.index(index))


def _pairs(one: FunctionCall) -> list[tuple[fx.Node, fx.Node]]:
    """Return each input of the body, paired with the call's input in its place."""
    return list(zip(one.given, one.inputs, strict=True))


@contextmanager
def cut(graph: fx.Graph) -> Iterator[dict[str, dict[fx.Node, fx.Node]]]:
    """Run the block with the calls cut out of the graph: nodes that read a call's results read the body's instead.

    Yield, by the path of the reading module, a mapping from each of the body's results read inside the block to the
    result of a call that is read outside it.
    """
    kept: list[tuple[fx.Node, Any, Any]] = []
    instead: dict[str, dict[fx.Node, fx.Node]] = {}
    for one in calls(graph):
        body_values = one.body_results
        for user, index in one.results.items():
            for reader in list(user.users):
                kept.append((reader, reader.args, reader.kwargs))
                instead.setdefault(str(reader.meta.get("module", "")), {})[body_values[index]] = user
                reader.replace_input_with(user, body_values[index])
        kept.append((one.node, one.node.args, one.node.kwargs))
        one.node.args = (one.path, one.body, [], [], [])
    try:
        yield instead
    finally:
        for node, args, kwargs in reversed(kept):
            node.args, node.kwargs = args, kwargs


def everywhere(graph: fx.Graph, paths: Mapping[str, Any]) -> dict[str, Any]:
    """Extend values by module path to the layers that call functions, whose values equal the body's."""
    values = dict(paths)
    for one in calls(graph):
        values |= {renamed(p, one.body, one.path): v for p, v in paths.items() if is_within(p, one.body)}
    return values
