"""Capture the union of a model's elements: one trace for each kind of call, however many elements are called that way.

Two elements are of one kind if their modules have the same contents, apart from integers that the traced one does not
read, and they are called alike. Each kind is captured on its own, from a model that contains only its first element
(`alone`), and has a file of its own in the capture cache. In the graph of the union, the other elements call the
first one's part as a function (`graftc.passes.core.ir.functions`).
"""

from __future__ import annotations

import copy
import operator
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, chain
from typing import Any

import torch
from torch import Tensor, fx, nn

from graftc.compat.modules import BUFFERS, CHILDREN, PARAMETERS
from graftc.compiler.capture.alike.modules import Contents, contents_of
from graftc.compiler.capture.capture import Capture
from graftc.compiler.capture.capture_cache import Known, captured, key
from graftc.compiler.capture.parameter_uses import memory_of
from graftc.compiler.capture.request import CaptureRequest
from graftc.compiler.live.elements import elements_class
from graftc.passes.core.elements.calls import CALLS, calls_in, input_names, write_calls
from graftc.passes.core.ir.effects import Memory
from graftc.passes.core.ir.functions import call, expand, prune
from graftc.passes.core.ir.history import Changes, ErasedNode, HistoryEntry, Reads, names_read
from graftc.passes.core.ir.new_nodes import copy_node
from graftc.passes.core.ir.program import InputSpec, OutputSpec, Program
from graftc.passes.core.ir.shapes import FakeContext, SymbolNames
from graftc.passes.core.ir.updates import updates

_SYMBOL = re.compile(r"\bs(\d+)\b")


def captured_by_kinds(request: CaptureRequest, known: Known, *, use_cache: bool, alike: bool = True) -> Capture:
    """Return the capture of a union, composed of one capture for each kind of call, or of a model that is one graph.

    Args:
        request: the union with the calls to its elements, or the model.
        known: existing captures, by key; see `captured`.
        use_cache: whether to look up and store the captures of kinds in the user's cache folder.
        alike: whether elements share a capture; otherwise, each is captured on its own.

    Raises:
        GraftError: GC030 if torch.export cannot capture an element.
    """
    structures = calls_in(request.flags)
    if not structures:
        return captured(request, known, use_cache=use_cache)
    whole = key(request)
    if (before := known.get(whole or "")) is not None and (capture := before()) is not None:
        return replace(capture, key=whole)
    axes = {axis.name: axis for axis in request.axes}
    names = {path: input_names(path, axes) for path in structures}
    contents = contents_of(request.model, structures) if alike else {}
    waiting: dict[Any, list[str]] = {}
    for path, structure in structures.items():
        own = contents.get(path)
        taken = tuple((axes[name].dtype, axes[name].axes) for name in names[path])
        waiting.setdefault((structure.text, taken, path if own is None else own.text), []).append(path)
    parts: list[_Part] = []
    for paths in waiting.values():
        while paths:
            first = paths[0]
            part = captured_alone(request, first, known, use_cache=use_cache)
            same = [path for path in paths if path == first or _stands_for(part, contents[first], contents[path])]
            parts.append(_Part(part, same))
            paths = [path for path in paths if path not in same]
    return replace(_composed(request, parts, names), key=whole)


def captured_alone(request: CaptureRequest, path: str, known: Known, *, use_cache: bool) -> Capture:
    """Return the capture of one element of a union.

    Args:
        request: the union, and calls to its elements, among them to this one.
        path: the element.
        known, use_cache: as for `captured_by_kinds`.
    """
    axes = {axis.name: axis for axis in request.axes}
    part = replace(
        request,
        model=alone(request.model, path),
        axes=tuple(axes[name] for name in input_names(path, axes)),
        flags=((CALLS, write_calls([(path, calls_in(request.flags)[path])])),),
    )
    capture = captured(part, use_cache=use_cache, known=known)
    own = {memory_of(tensor) for tensor in chain(request.model.parameters(), request.model.buffers())}
    if any(memory_of(constant) in own and not constant.is_meta for constant in capture.constants.values()):
        # It reads a tensor of a module outside of it, which a model of this element alone does not contain.
        capture = captured(replace(part, model=request.model), use_cache=use_cache, known=known)
    return capture


def alone(model: nn.Module, path: str) -> nn.Module:
    """Return a copy of a union that contains only one element, in its place; the element's modules are shared.

    Its class is named like the union's, but has only the conventions of its library: none of the model's own code runs.
    """
    root = reached = _bare(model)
    *outer, last = path.split(".")
    for name in outer:
        model = model.get_submodule(name)
        vars(reached)[CHILDREN][name] = inner = _bare(model)
        inner.__class__ = nn.Module
        reached = inner
    vars(reached)[CHILDREN][last] = model.get_submodule(last)
    root.__class__ = elements_class(type(root), next(c for c in type(root).__mro__ if c.__module__ in _LIBRARIES))
    return root


def _bare(module: nn.Module) -> nn.Module:
    """Return a shallow copy of a module without tensors and submodules."""
    bare: nn.Module = copy.copy(module)
    vars(bare).update({CHILDREN: {}, PARAMETERS: {}, BUFFERS: {}})
    return bare


_LIBRARIES = ("transformers.modeling_utils", "torch.nn.modules.module")
"""The modules of the classes from which models derive."""


def _stands_for(capture: Capture, own: Contents, other: Contents) -> bool:
    """Return whether all integers that a traced element read are the same in another element."""
    return all(own.numbers.get(place) == other.numbers.get(place) for place in capture.read)


@dataclass(frozen=True)
class _Part:
    """The capture of a kind's first element, and the paths of all its elements."""

    capture: Capture
    paths: Sequence[str]


def _composed(request: CaptureRequest, parts: Sequence[_Part], names: Mapping[str, Sequence[str]]) -> Capture:
    """Return one capture in which each kind's first element is written out, and the others call it.

    Args:
        request: the union, and the calls to its elements.
        parts: the captures of the kinds.
        names: the names of the inputs of each element, in order.
    """
    graph, context = fx.Graph(), FakeContext(most=sys.maxsize)
    writing = [_Writing(numbered, graph, context, names) for numbered in _numbered(parts)]
    specs = {name: spec for one in writing for name, spec in one.specs.items()}
    ordered = tuple(specs[axis.name] for axis in request.axes)
    given: dict[str, fx.Node] = {}
    for spec in ordered:
        node = given[spec.name] = graph.create_node("placeholder", spec.name, name=spec.name)
        node.meta["module"] = ""
    results: dict[str, list[Any]] = {}
    for one in writing:
        results |= one.write(given)
    paths = calls_in(request.flags)
    output = graph.output(tuple(leaf for path in paths for leaf in results[path]))
    output.meta.update(val=None, module="")
    outputs = {path: one.part.capture.traced.outputs.children[0] for one in writing for path in one.part.paths}
    program = Program(graph, ordered, OutputSpec("dict", tuple(paths), tuple(outputs[path] for path in paths)))
    program.mode, program.flags = request.mode, request.flags
    program.checks = tuple(check for part in parts for check in part.capture.traced.checks)
    firsts = dict(zip(paths, accumulate((len(results[path]) for path in paths), initial=0), strict=False))
    program.history = [_history([one.history(firsts[one.part.paths[0]]) for one in writing], output)]
    if writes := Memory(graph).writes:
        expand(graph, writes=writes)  # writes have to stay in the order of the layers
    prune(graph)
    program.updates = updates(graph)
    captures = [part.capture for part in parts]
    return Capture(
        program,
        {name: tensor for capture in captures for name, tensor in capture.constants.items()},
        sum(capture.seconds for capture in captures),
        all(capture.cached for capture in captures),
        tuple(dict.fromkeys(note for capture in captures for note in capture.notes)),
        assigned=tuple(dict.fromkeys(name for capture in captures for name in capture.assigned)),
        alike=sum(len(part.paths) - 1 for part in parts),
    )


def _numbered(parts: Sequence[_Part]) -> list[tuple[_Part, SymbolNames, int]]:
    """Return the parts, each with the names of its sizes and the number of sizes in the parts before it."""
    numbered, before = [], 0
    for part in parts:
        symbols = SymbolNames(part.capture.traced)
        for node in part.capture.traced.graph.nodes:
            symbols.type(node.meta.get("val"))
        numbered.append((part, symbols, before))
        before += len(symbols.symbols)
    return numbered


class _Writing:
    """Writes one kind into the graph of a union.

    Args:
        numbered: the kind; see `_numbered`.
        graph: the graph of the union.
        context: the context of all fake tensors in it.
        names: the names of the inputs of each element, in order.
    """

    def __init__(
        self,
        numbered: tuple[_Part, SymbolNames, int],
        graph: fx.Graph,
        context: FakeContext,
        names: Mapping[str, Sequence[str]],
    ) -> None:
        self.part, self._symbols, self._before = numbered
        self._graph, self._context, self._names = graph, context, names
        self._copies: dict[fx.Node, Any] = {}
        own = {spec.name: spec for spec in self.part.capture.traced.inputs}
        first, *_ = self.part.paths
        self.specs: dict[str, InputSpec] = {
            name: replace(own[like], name=name)
            for path in self.part.paths
            for like, name in zip(names[first], names[path], strict=True)
        }

    def write(self, given: Mapping[str, fx.Node]) -> dict[str, list[Any]]:
        """Write the kind's nodes, and return the flat results of each element.

        Args:
            given: the nodes of the union's inputs, by name.
        """
        first, *others = self.part.paths
        attributes = {str(node.target): node for node in self._graph.find_nodes(op="get_attr")}
        leaves: list[Any] = []
        for node in self.part.capture.traced.graph.nodes:
            if node.op == "output":
                leaves = [self._copies[leaf] if isinstance(leaf, fx.Node) else leaf for leaf in node.args[0]]
                break
            if node.op == "placeholder":
                copied = given[str(node.target)]
            elif node.op == "get_attr" and node.target in attributes:
                self._copies[node] = attributes[str(node.target)]
                continue
            else:
                copied = copy_node(self._graph, node, self._copies.__getitem__)
            copied.meta = {**node.meta, "val": self._typed(node.meta.get("val"))}
            self._copies[node] = copied
        own = [given[name] for name in self._names[first]]
        body = list(dict.fromkeys(leaf for leaf in leaves if isinstance(leaf, fx.Node) and leaf not in own))
        results = {first: leaves}
        for path in others:
            inputs = [given[name] for name in self._names[path]]
            for like, node in zip(own, inputs, strict=True):
                node.meta = dict(like.meta)
            instead: dict[Any, Any] = dict(zip(own, inputs, strict=True))
            if body:
                called = self._graph.create_node("call_function", call, (path, first, inputs, own, body), name="call")
                called.meta = {"val": [node.meta["val"] for node in body], "module": ""}
                for index, node in enumerate(body):
                    picked = self._graph.create_node("call_function", operator.getitem, (called, index))
                    picked.meta = {"val": node.meta["val"], "module": ""}
                    instead[node] = picked
            results[path] = [instead.get(leaf, leaf) if isinstance(leaf, fx.Node) else leaf for leaf in leaves]
        return results

    def _typed(self, value: Any) -> Any:
        """Return a value of the kind's graph with sizes, and as a fake tensor, of the union's graph."""
        if isinstance(value, Tensor):
            return self._context.tensor(value.dtype, tuple(map(self._size, value.shape)), value.device)
        if isinstance(value, list | tuple):
            return type(value)(map(self._typed, value))
        if isinstance(value, torch.SymInt):
            return self._context.size(self._size(value))
        return value

    def _size(self, size: Any) -> str:
        return _SYMBOL.sub(lambda found: f"s{int(found[1]) + self._before}", self._symbols.size(size))

    def history(self, leaf: int) -> HistoryEntry:
        """Return how the kind's graph was canonicalised, with the names of the union's nodes.

        Args:
            leaf: the position of the first element's results among those of the union.
        """
        (entry,) = self.part.capture.traced.history
        if (changes := entry.changes) is None:
            return entry
        at = self.part.paths[0].replace(".", "_")
        names = {node.name: copied.name for node, copied in self._copies.items()}
        names |= {name: f"{name}_in_{at}" for name in changes.erased}

        def reads(before: Reads) -> Reads:
            return tuple((position, names.get(name, name)) for position, name in before)

        erased: dict[str, ErasedNode] = {
            names[name]: replace(each, reads=reads(each.reads)) for name, each in changes.erased.items()
        }
        rewired = {names[name]: reads(before) for name, before in changes.rewired.items() if name in names}
        if "output" in changes.rewired:
            before = reads(changes.rewired["output"])
            rewired["output"] = tuple((f"0.{int(at.rpartition('.')[2]) + leaf}", name) for at, name in before)
        return replace(entry, changes=Changes(tuple(names[n] for n in changes.inserted if n in names), erased, rewired))


def _history(entries: Sequence[HistoryEntry], output: fx.Node) -> HistoryEntry:
    """Return the steps that canonicalised each kind as one step, in the union with this output node."""
    every = [entry.changes for entry in entries]
    merged = None
    if None not in every:
        rewired = {name: reads for changes in every if changes for name, reads in changes.rewired.items()}
        if output.name in rewired:
            of_kinds = (changes.rewired.get(output.name, ()) for changes in every if changes)
            before = dict([*names_read(output.args, {}), *chain.from_iterable(of_kinds)])
            rewired[output.name] = tuple(before.items())
        merged = Changes(
            tuple(name for changes in every if changes for name in changes.inserted),
            {name: each for changes in every if changes for name, each in changes.erased.items()},
            rewired,
        )
    added, removed = sum(entry.added for entry in entries), sum(entry.removed for entry in entries)
    return HistoryEntry(entries[0].step, added, removed, sum(entry.seconds for entry in entries), merged)
