"""Call hooks on modules within layers, with the arguments and results of the source's modules.

Each node of a graph records the module to which it belongs. If a module has hooks, the generated code stops where the
module begins and where it ends, and calls the hooks with the arguments and results of the source's module. Results that
hooks change replace the original ones, provided that all readers of the results come afterwards; arguments are
read-only. If no module has hooks, the code has no stops.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, fx, nn

from graftc.compat.hooks import forward_hooks, hooks_after, hooks_before
from graftc.passes.core.ir.functions import in_layer
from graftc.passes.core.ir.program import Program
from graftc.passes.core.ir.program_key import ProgramKey
from graftc.runtime.hooks.layer_calls import LayerCall, Pending, given, running_call, shown, taken
from graftc.runtime.hooks.layer_learning import Border, Shown, in_graph, source_calls
from graftc.specs.errors.diagnostics import GraftError

_HINT = "put it on the compiled model, on a whole layer or on the source model"


def border_of(program: Program, path: str) -> Border | None:
    """Return the border of a module within a layer; None if no node of the graph belongs to the module.

    The border's inputs are outside values that exist when the module begins: values that the module reads, and values
    that are read later, which the source may also pass to the module.

    Args:
        program: the graph.
        path: the path of the module.
    """
    inside = _inside(program.graph, path)
    if not inside:
        return None
    order = {node: number for number, node in enumerate(program.graph.nodes)}
    known, start = set(inside), order[inside[0]]
    sources = dict.fromkeys(source for node in inside for source in node.all_input_nodes if source not in known)
    inputs = [source for source in sources if source.op != "get_attr" and order[source] < start]
    inputs += [node for node in order if node not in sources and _is_alive(node, order, start)]
    outputs = [node for node in inside if any(user not in known for user in node.users)]
    return Border(path, 0, *(tuple(node.name for node in nodes) for nodes in (inputs, outputs)))


def _inside(graph: fx.Graph, path: str) -> list[fx.Node]:
    return [node for node in graph.nodes if node.op == "call_function" and in_layer(node, path)]


def _is_alive(node: fx.Node, order: Mapping[fx.Node, int], start: int) -> bool:
    """Return whether a value exists before a node and is read after it."""
    value = node.op in ("placeholder", "call_function") and isinstance(node.meta.get("val"), Tensor)
    return value and order[node] < start and any(order[user] > start and user.op != "output" for user in node.users)


def stopping(program: Program, paths: Iterable[str]) -> Program:
    """Return a copy of a Program that stops at module boundaries; inner modules' stops are nested in outer ones."""
    stopped = program.copy()
    for path in sorted(paths, key=lambda path: path.count("."), reverse=True):
        if (border := border_of(stopped, path)) is not None:
            _stop(stopped.graph, border)
    return stopped


def _stop(graph: fx.Graph, border: Border) -> None:
    nodes = {node.name: node for node in graph.nodes}
    inputs, outputs = ([nodes[name] for name in names] for names in (border.inputs, border.outputs))
    inside = _inside(graph, border.path)
    last = inside[-1]
    order = {node: number for number, node in enumerate(graph.nodes)}
    with graph.inserting_before(inside[0]):
        begun = graph.call_function(begin, (border.path, tuple(inputs)))
        begun.meta = {"module": border.path, "val": tuple(node.meta.get("val") for node in inputs)}
        for number, node in enumerate(inputs):
            _take(graph, begun, number, node, set(inside).__contains__)
    whole = all(order[user] > order[last] for node in outputs for user in node.users if user not in inside)
    with graph.inserting_after(last):
        ended = graph.call_function(end, (border.path, begun, tuple(outputs), whole))
    ended.meta = {"module": border.path, "val": tuple(node.meta.get("val") for node in outputs)}
    behind = {node for node, number in order.items() if number > order[last]}
    with graph.inserting_after(ended):
        for number, node in enumerate(outputs):
            _take(graph, ended, number, node, behind.__contains__)


def _take(graph: fx.Graph, source: fx.Node, number: int, node: fx.Node, wanted: Callable[[fx.Node], bool]) -> None:
    """Redirect some of a value's users to the value that a stop passes on."""
    passed = graph.call_function(_passed_on, (source, number))
    passed.meta = {**node.meta, "module": source.meta["module"]}
    node.replace_all_uses_with(passed, delete_user_cb=wanted)


def _passed_on(values: Sequence[Any], number: int) -> Any:
    return values[number]


def begin(path: str, values: tuple[Any, ...]) -> tuple[Any, ...]:
    """Call a module's forward pre-hooks; generated code calls this where the module begins."""
    run = running_call()
    module = None if run is None else heard_module(run.module, path)
    if run is None or module is None:
        return values
    call = run.module_calls().get(path)
    if call is None:  # a list of layers, which is never called
        return values
    args, kwargs = (shown(tree, values, run.cache) for tree in (call.args, call.kwargs))
    run.begun.append((path, args, kwargs))
    for hook, with_kwargs in hooks_before(module):
        if with_kwargs:
            before = dict(kwargs)
            _require_unchanged(path, hook(module, args, kwargs), (args, kwargs))
            same = kwargs.keys() == before.keys() and all(kwargs[name] is before[name] for name in before)
            _require_unchanged(path, None if same else kwargs, None)
        else:
            result = hook(module, args)
            _require_unchanged(path, result if isinstance(result, tuple) or result is None else (result,), args)
    return values


def end(path: str, begun: tuple[Any, ...], values: tuple[Any, ...], whole: bool) -> tuple[Any, ...]:
    """Call a module's forward hooks; generated code calls this where the module ends.

    The hooks may replace the results by values of the same form if all readers of the results come afterwards.
    """
    run = running_call()
    if run is None or not run.begun or run.begun[-1][0] != path:
        return values
    _, args, kwargs = run.begun.pop()
    module, call = run.module.get_submodule(path), run.module_calls()[path]
    pending = Pending(None, path, "", (), call, run.cache)
    results = given(pending, values)
    for hook, with_kwargs in hooks_after(module):
        replacement = hook(module, args, *([kwargs] if with_kwargs else []), results)
        results = results if replacement is None else replacement
    outputs: tuple[Any, ...] = taken(pending, results)
    if not whole and any(one is not other for one, other in zip(outputs, values, strict=True)):
        raise _read_only(path)
    return outputs


def heard_module(root: nn.Module, path: str) -> nn.Module | None:
    """Return the module at a path if it currently has hooks; otherwise None."""
    module = root.get_submodule(path)
    return module if forward_hooks(module) else None


def _require_unchanged(path: str, returned: Any, given: Any) -> None:
    """Check that a hook has not changed read-only values.

    Raises:
        GraftError: GC043 if it has.
    """
    same = returned is None or returned is given
    if not same and isinstance(returned, tuple) and isinstance(given, tuple) and len(returned) == len(given):
        same = all(one is other for one, other in zip(returned, given, strict=True))
    if not same:
        raise _read_only(path)


def _read_only(path: str) -> GraftError:
    message = f"a hook on {path} changes the module's arguments or results, which it may only read"
    return GraftError("GC043", message, hint=_HINT)


def learn_modules(view: Shown, key: ProgramKey, paths: Sequence[str]) -> dict[str, LayerCall]:
    """Return how the source's modules are called in the computation that a graph performs, by path.

    Modules without nodes in the graph are left out, as are modules that the source does not call.

    Args:
        view: the view whose code runs.
        key: the key of the Program.
        paths: the paths of the modules.
    """
    program = view.lowered_of(key)
    stops = {path: border for path in paths if (border := original_border(program, path)) is not None}

    def borders(base: Program) -> dict[tuple[str, int], Border]:
        return {(path, 0): border for path in stops if (border := border_of(base, path)) is not None}

    calls = source_calls(view.compilation, key, borders)
    return {
        path: in_graph(call, border, stops[path], program, by_name=True)
        for (path, _), (call, border) in calls.items()
        if call.called
    }


def original_border(program: Program, path: str) -> Border | None:
    """Return the border of a module in a Program that stops at its boundaries; None if it does not stop there.

    The names are those of the original values, which the stops pass on.
    """
    begun = next((n for n in program.graph.nodes if n.target is begin and n.args[0] == path), None)
    ended = next((n for n in program.graph.nodes if n.target is end and n.args[0] == path), None)
    if begun is None or ended is None:
        return None
    return Border(path, 0, *(tuple(map(_named, values)) for values in (begun.args[1], ended.args[2])))


def without_stops(border: Border, program: Program) -> Border:
    """Return a border with the names that its values have in the Program without stops.

    Args:
        border: the border of a part of a Program that has stops.
        program: the Program that has stops.
    """
    names = {node.name: _named(node) for node in program.graph.nodes if node.target is _passed_on}
    inputs, outputs = (tuple(names.get(each, each) for each in own) for own in (border.inputs, border.outputs))
    return replace(border, inputs=inputs, outputs=outputs)


def _named(node: Any) -> str:
    while node.target is _passed_on:
        stop, number = node.args
        node = stop.args[1 if stop.target is begin else 2][number]
    return str(node.name)
