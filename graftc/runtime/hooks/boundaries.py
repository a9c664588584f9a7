"""Modules below layers as their source's are called: what hooks on any of them see.

A graph knows which of its nodes belong to a module. Where a module has hooks, code is made that stops where the module
begins and where it ends: hooks hear of the call there, with the arguments and results that the source's has. What they
make of results takes their place where all that reads them comes afterwards; arguments they may only read. Where no
module has hooks, code has no such stops.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch.nn.modules.module as torch_module
from torch import Tensor, fx, nn

from graftc.passes.core.ir.functions import in_layer
from graftc.passes.core.ir.program import Program
from graftc.passes.core.ir.program_key import ProgramKey
from graftc.runtime.hooks.layer_calls import LayerCall, Pending, given, mapped, running_call, taken, unknown_call
from graftc.runtime.hooks.layer_learning import Border, Shown, in_graph, source_calls_at
from graftc.specs.errors.diagnostics import GraftError

_HINT = "put it on the compiled model, on a whole layer or on the source model"


@dataclass(frozen=True)
class Boundary:
    """Where a module begins and ends in a graph, by the names of nodes.

    Attributes:
        path: of the module.
        first, last: its nodes in between which all others stand.
        inputs: values from outside that are there when it begins: those that it reads, and others that are read later,
            which the source may hand to the module as well.
        outputs: values that others read.
    """

    path: str
    first: str
    last: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]

    @property
    def border(self) -> Border:
        """The same, as that of a layer."""
        return Border(self.path, 0, self.inputs, self.outputs)


def boundary_of(program: Program, path: str) -> Boundary | None:
    """That of a module; None where a graph has nothing of it.

    Args:
        program: the graph.
        path: of the module.
    """
    order = {node: number for number, node in enumerate(program.graph.nodes)}
    inside = [node for node in order if node.op == "call_function" and in_layer(node, path)]
    if not inside:
        return None
    known, start = set(inside), order[inside[0]]
    sources = dict.fromkeys(source for node in inside for source in node.all_input_nodes if source not in known)
    inputs = [source for source in sources if source.op != "get_attr" and order[source] < start]
    inputs += [node for node in order if node not in sources and _is_alive(node, order, start)]
    outputs = [node for node in inside if any(user not in known for user in node.users)]
    names = (tuple(node.name for node in nodes) for nodes in (inputs, outputs))
    return Boundary(path, inside[0].name, inside[-1].name, *names)


def _is_alive(node: fx.Node, order: Mapping[fx.Node, int], start: int) -> bool:
    """Whether a value is there before a node, and read behind it."""
    value = node.op in ("placeholder", "call_function") and isinstance(node.meta.get("val"), Tensor)
    return value and order[node] < start and any(order[user] > start and user.op != "output" for user in node.users)


def stopping(program: Program, paths: Iterable[str]) -> Program:
    """A copy of a Program that stops at the boundaries of modules, those of inner ones within those of outer ones."""
    made = program.copy()
    for path in sorted(paths, key=lambda path: path.count("."), reverse=True):
        if (boundary := boundary_of(made, path)) is not None:
            _stop(made.graph, boundary)
    return made


def _stop(graph: fx.Graph, boundary: Boundary) -> None:
    nodes = {node.name: node for node in graph.nodes}
    own = {"module": boundary.path}
    inputs, outputs = ([nodes[name] for name in names] for names in (boundary.inputs, boundary.outputs))
    first, last = nodes[boundary.first], nodes[boundary.last]
    inside = {node for node in graph.nodes if in_layer(node, boundary.path)}
    order = {node: number for number, node in enumerate(graph.nodes)}
    with graph.inserting_before(first):
        begun = graph.call_function(begin, (boundary.path, tuple(inputs)))
        begun.meta = {**own, "val": tuple(node.meta.get("val") for node in inputs)}
        for number, node in enumerate(inputs):
            _take(graph, begun, number, node, lambda user: user in inside)
    whole = all(order[user] > order[last] for node in outputs for user in node.users if user not in inside)
    with graph.inserting_after(last):
        ended = graph.call_function(end, (boundary.path, begun, tuple(outputs), whole))
    ended.meta = {**own, "val": tuple(node.meta.get("val") for node in outputs)}
    behind = {node for node, number in order.items() if number > order[last]}
    with graph.inserting_after(ended):
        for number, node in enumerate(outputs):
            _take(graph, ended, number, node, lambda user: user in behind)


def _take(graph: fx.Graph, source: fx.Node, number: int, node: fx.Node, wanted: Callable[[fx.Node], bool]) -> None:
    """Let some users of a value read it as a stop has passed it on."""
    passed = graph.call_function(_passed_on, (source, number))
    passed.meta = {**node.meta, "module": source.meta["module"]}
    node.replace_all_uses_with(passed, delete_user_cb=wanted)


def _passed_on(values: Sequence[Any], number: int) -> Any:
    return values[number]


def begin(path: str, values: tuple[Any, ...]) -> tuple[Any, ...]:
    """What code calls where a module begins: hooks before a call hear of it."""
    run = running_call()
    module = None if run is None else heard_module(run.module, path)
    if run is None or module is None:
        return values
    call = run.module_calls().get(path)
    if call is None:  # a list of layers, which nobody calls
        return values
    values_at = _reader(values, run.cache)
    args, kwargs = mapped(call.args, values_at), mapped(call.kwargs, values_at)
    run.begun.append((path, args, kwargs))
    for number, hook in _tables(module, "forward_pre_hooks"):
        if number in module._forward_pre_hooks_with_kwargs:
            before = dict(kwargs)
            _require_unchanged(path, hook(module, args, kwargs), (args, kwargs))
            same = kwargs.keys() == before.keys() and all(kwargs[name] is before[name] for name in before)
            _require_unchanged(path, None if same else kwargs, None)
        else:
            found = hook(module, args)
            _require_unchanged(path, found if isinstance(found, tuple) or found is None else (found,), args)
    return values


def end(path: str, begun: tuple[Any, ...], values: tuple[Any, ...], whole: bool) -> tuple[Any, ...]:
    """What code calls where a module ends: hooks behind a call hear of it, and may put other values of the same kind in
    the place of its results, where all that reads these comes afterwards."""
    run = running_call()
    if run is None or not run.begun or run.begun[-1][0] != path:
        return values
    _, args, kwargs = run.begun.pop()
    module, call = run.module.get_submodule(path), run.module_calls()[path]
    pending = Pending(None, path, "", (), call)
    results = given(pending, values)
    for number, hook in _tables(module, "forward_hooks"):
        with_kwargs = number in module._forward_hooks_with_kwargs
        found = hook(module, args, *([kwargs] if with_kwargs else []), results)
        results = results if found is None else found
    made: tuple[Any, ...] = taken(pending, results)
    if not whole and any(one is not other for one, other in zip(made, values, strict=True)):
        raise _read_only(path)
    return made


def _reader(values: Sequence[Any], cache: Any) -> Callable[[Any], Any]:
    return lambda leaf: values[leaf.at] if leaf.at is not None else (cache if leaf.cache else leaf.held)


def _tables(module: nn.Module, name: str) -> list[tuple[int, Any]]:
    everywhere: Mapping[int, Any] = getattr(torch_module, f"_global_{name}")
    own: Mapping[int, Any] = getattr(module, f"_{name}")
    return [*everywhere.items(), *own.items()]


def heard_module(root: nn.Module, path: str) -> nn.Module | None:
    """A module that has hooks; None where it has none, any more."""
    module = root.get_submodule(path)
    return module if module._forward_hooks or module._forward_pre_hooks else None


def _require_unchanged(path: str, found: Any, given: Any) -> None:
    """Refuse what a hook makes of a value that it may only read.

    Raises:
        GraftError: GC043.
    """
    same = found is None or found is given
    if not same and isinstance(found, tuple) and isinstance(given, tuple) and len(found) == len(given):
        same = all(one is other for one, other in zip(found, given, strict=True))
    if not same:
        raise _read_only(path)


def _read_only(path: str) -> GraftError:
    message = f"a hook on {path} changes what the module is given or gives, and may only read it"
    return GraftError("GC043", message, hint=_HINT)


def learn_modules(shown: Shown, key: ProgramKey, paths: Sequence[str]) -> dict[str, LayerCall]:
    """How modules of the source are called where a graph runs; those that it has nothing of are left out, and so are
    those that the source does not call.

    Args:
        shown: the code that runs.
        key: of the Program.
        paths: of the modules.
    """
    program, found = shown.lowered_of(key), dict[str, LayerCall]()
    own = {path: each for path in paths if (each := original_boundary(program, path)) is not None}
    calls = source_calls_at(shown.compilation, key, lambda base: _borders(base, own))
    for (path, _), (call, border) in calls.items():
        if call.called:
            found[path] = in_graph(call, border, own[path].border, program, by_name=True)
    return found


def unknown_modules(paths: Iterable[str]) -> dict[str, LayerCall]:
    """The same where nobody can tell: in a sharded model, whose tensors no process has."""
    return {path: unknown_call(path) for path in paths}


def _borders(base: Program, paths: Mapping[str, Boundary]) -> dict[tuple[str, int], Border]:
    made = {path: boundary_of(base, path) for path in paths}
    return {(path, 0): each.border for path, each in made.items() if each is not None}


def original_boundary(program: Program, path: str) -> Boundary | None:
    """The boundary of a module in a Program that stops there: names are those of the values that are passed on."""
    begun = next((n for n in program.graph.nodes if n.target is begin and n.args[0] == path), None)
    ended = next((n for n in program.graph.nodes if n.target is end and n.args[0] == path), None)
    if begun is None or ended is None:
        return None
    inputs, outputs = (tuple(map(_named, values)) for values in (begun.args[1], ended.args[2]))
    return replace(Boundary(path, begun.name, ended.name, (), ()), inputs=inputs, outputs=outputs)


def without_stops(border: Border, program: Program) -> Border:
    """A border by the names that values have where nothing stops.

    Args:
        border: of a part of a Program that stops at boundaries.
        program: that Program.
    """
    names = {node.name: _named(node) for node in program.graph.nodes if node.target is _passed_on}
    inputs, outputs = (tuple(names.get(each, each) for each in own) for own in (border.inputs, border.outputs))
    return replace(border, inputs=inputs, outputs=outputs)


def _named(node: Any) -> str:
    while node.target is _passed_on:
        stop, number = node.args
        node = stop.args[1 if stop.target is begin else 2][number]
    return str(node.name)
