"""Layer calls in the source's form, with the values that hooks on a layer receive and may change.

A graph calls a layer with the values that its part of the graph reads, in any order, and gets back the values that
other parts read, such as keys and values for a cache. Hooks, however, are written for the source's layers. A layer with
hooks is therefore called with the arguments of the source's layer, and returns that layer's results. To find the graph
values that correspond to them, the source model and the graph are run once on a sample, and their values are compared.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

from graftc.compat.hooks import BACKWARD, FORWARD, has_global_hooks
from graftc.compat.modules import children_of
from graftc.passes.core.weights.containers import OWN, of_fsdp
from graftc.specs.errors.diagnostics import GraftError

_HINT = "put the hook on the compiled model or on the source model"


class NotInGraph:
    """A placeholder passed to a hook for a source value that the graph lacks or has in another form.

    It may be passed on; any other use raises an error.

    Raises:
        GraftError: GC043 for any other use.
    """

    def __init__(self, name: str, path: str) -> None:
        vars(self).update(_name=name, _path=path)

    def __repr__(self) -> str:
        return f"<{self._name} of {self._path}, which the graph does not have>"

    def _refuse(self, *_: Any, **__: Any) -> Any:
        message = f"a hook on {self._path} accesses {self._name}, a value that the graph does not have in this form"
        raise GraftError("GC043", message, hint=_HINT)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self._refuse()

    __getitem__ = __len__ = __iter__ = __bool__ = __add__ = __radd__ = __mul__ = __rmul__ = _refuse
    __sub__ = __rsub__ = __truediv__ = __matmul__ = __neg__ = __float__ = __int__ = _refuse


@dataclass(frozen=True)
class Leaf:
    """A leaf in the tree of a layer's arguments or results.

    Attributes:
        name: the name of the leaf, for messages.
        at: the index of its value among the graph's values; None if the graph does not have it.
        value: the value, if the graph does not have it.
        cache: whether the value is the call's cache.
    """

    name: str
    at: int | None = None
    value: Any = None
    cache: bool = False


@dataclass(frozen=True)
class LayerCall:
    """The form in which the source calls a layer, and the graph values that appear in it.

    Attributes:
        args, kwargs, results: trees of `Leaf`.
        called: whether the source ever calls the layer; a list of layers is never called.
    """

    args: Any
    kwargs: Any
    results: Any
    called: bool = True


def unknown_call(path: str) -> LayerCall:
    """Return the call for a layer whose calls in the source cannot be matched with those in the graph."""
    arguments, results = (Leaf(name, value=NotInGraph(name, path)) for name in ("its arguments", "its results"))
    return LayerCall((arguments,), {}, results)


@dataclass
class Hearing:
    """The hooks that observe calls to a model's layers.

    Attributes:
        hooked: whether any layer has hooks of its own.
        everywhere: whether global hooks, which apply to every module, have ever been registered.
        live: whether the source's own modules call the layers and their hooks.
    """

    hooked: bool = False
    everywhere: bool = False
    live: bool = False


@dataclass
class Running:
    """A call to a model whose layers have hooks.

    Attributes:
        learn: a function that determines how layers are called in the graph that runs.
        module_calls: a function that returns how modules within layers are called in that graph, by path.
        module: the model.
        cache: the cache of the call; None if it has none.
        begun: the modules that have begun but not ended, with their arguments, innermost last.
    """

    learn: Callable[[], None]
    module_calls: Callable[[], Mapping[str, LayerCall]]
    module: nn.Module
    cache: Any
    begun: list[tuple[str, Any, Any]] = field(default_factory=list)


@dataclass
class Pending:
    """The state of a layer call while values pass between the graph and the layer's hooks."""

    owner: Any
    path: str
    key: str
    inputs: Sequence[Any]
    call: LayerCall
    cache: Any
    raw: Any = None
    shown: Any = None
    ran: bool = False


class _Stacks(threading.local):
    """The current thread's calls, innermost last."""

    def __init__(self) -> None:
        self.running: list[Running] = []
        self.pending: list[Pending] = []


_stacks = _Stacks()


@contextmanager
def running(call: Running) -> Iterator[None]:
    """While the block runs, call layers with hooks in the source's form, and call the hooks on other modules."""
    _stacks.running.append(call)
    try:
        yield
    finally:
        _stacks.running.pop()


def running_call() -> Running | None:
    """Return this thread's innermost call to a model with hooks; None if no such call is running."""
    return _stacks.running[-1] if _stacks.running else None


def hooks_everywhere() -> bool:
    """Return whether global hooks, which apply to every module, are registered."""
    return has_global_hooks()


def is_heard(module: nn.Module) -> bool:
    """Return whether a layer, or a wrapper that another library has put around it, has hooks that read values."""
    if hooks_everywhere():
        return True
    tables = (vars(each)[name] for each in (module, *_within(module)) for name in (*FORWARD, *BACKWARD))
    return any(not of_fsdp(hook) for table in tables for hook in table.values())


def _within(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the modules inside a wrapper, down to the layer itself."""
    while OWN not in vars(module) and len(children_of(module)) == 1:
        (inner,) = children_of(module).values()
        if inner is None:
            return
        yield (module := inner)


def enter(owner: Any, module: Any, key: str, inputs: Sequence[Any]) -> Any:
    """Call a layer the way the source model calls it.

    Args:
        owner: the code of the layer.
        module: the layer, or the wrapper around it.
        key: the name of its code in the graph.
        inputs: the values that the code reads.

    Returns:
        The results of the code, with any changes made by hooks.
    """
    run = _stacks.running[-1]
    path = type(module).__name__
    if key not in owner.calls:
        run.learn()
    call = owner.calls.get(key) or unknown_call(path)
    pending = Pending(owner, path, key, inputs, call, run.cache)
    args, kwargs = (shown(tree, inputs, run.cache) for tree in (call.args, call.kwargs))
    _stacks.pending.append(pending)
    try:
        result = module(*args, **kwargs)
    finally:
        _stacks.pending.pop()
    return taken(pending, result)


def pending_for(owner: Any) -> Pending | None:
    """Return the prepared call that a layer's ``forward`` has to run; None if there is none."""
    last = _stacks.pending[-1] if _stacks.pending else None
    return last if last is not None and last.owner is owner and not last.ran else None


def inputs_of(pending: Pending, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Any]:
    """Return the values that a layer's code reads, with any changes that hooks made to the layer's arguments.

    Raises:
        GraftError: GC043 if hooks have changed a value that the graph does not have.
    """
    trees = pending.call.args, pending.call.kwargs
    return _with_changes(pending, pending.inputs, trees, (args, dict(kwargs)), "arguments")


def given(pending: Pending, raw: Any) -> Any:
    """Convert the results of a layer's code to the result of the layer's ``forward``."""
    outputs = raw if isinstance(raw, tuple | list) else (raw,)
    pending.raw, pending.ran = raw, True
    pending.shown = shown(pending.call.results, outputs, pending.cache)
    return pending.shown


def taken(pending: Pending, result: Any) -> Any:
    """Convert the layer's result, after hooks have run, to the results with which the graph continues."""
    if result is pending.shown:
        return pending.raw
    single = not isinstance(pending.raw, tuple | list)
    outputs = [pending.raw] if single else pending.raw
    outputs = _with_changes(pending, outputs, pending.call.results, result, "results")
    return outputs[0] if single else tuple(outputs)


def _with_changes(pending: Pending, values: Sequence[Any], tree: Any, changed: Any, what: str) -> list[Any]:
    """Return the graph's values after applying the changes that hooks made to arguments or results.

    Args:
        pending: the call.
        values: the graph's values.
        tree: the tree of leaves of the arguments or results.
        changed: the arguments or results after the hooks have run.
        what: ``arguments`` or ``results``, for messages.
    """
    results = list(values)
    for leaf, value in _paired(pending, tree, changed, what):
        was = shown(leaf, values, pending.cache)
        if value is was:
            continue
        if leaf.at is None:
            message = f"a hook on {pending.path} changes {leaf.name}, a value that the graph does not have in this form"
            raise GraftError("GC043", message, hint=_HINT)
        results[leaf.at] = _alike(pending, leaf.name, was, value)
    return results


def _alike(pending: Pending, name: str, was: Any, value: Any) -> Any:
    if not isinstance(value, Tensor) or value.shape != was.shape or value.dtype != was.dtype:
        one, other = (_described(each) for each in (was, value))
        raise GraftError("GC043", f"a hook on {pending.path} changes {name} from {one} to {other}", hint=_HINT)
    return value


def _described(value: Any) -> str:
    if not isinstance(value, Tensor):
        return f"a {type(value).__name__}"
    return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"


def shown(tree: Any, values: Sequence[Any], cache: Any) -> Any:
    """Return the value that hooks receive for a tree of leaves, given the graph's values and the call's cache."""
    if isinstance(tree, Leaf):
        outside = cache if tree.cache else tree.value
        return outside if tree.at is None else values[tree.at]
    if isinstance(tree, dict):
        members = {name: shown(each, values, cache) for name, each in tree.items()}
        return members if type(tree) is dict else type(tree)(**members)
    return type(tree)(shown(each, values, cache) for each in tree)


def _paired(pending: Pending, tree: Any, value: Any, what: str) -> Iterator[tuple[Leaf, Any]]:
    """Yield the leaves of a tree, each with the corresponding part of a value.

    Raises:
        GraftError: GC043 if the structure of the value differs from that of the tree.
    """
    if isinstance(tree, Leaf):
        yield tree, value
        return
    alike = isinstance(value, dict) if isinstance(tree, dict) else isinstance(value, tuple | list)
    if not alike or len(value) != len(tree) or (isinstance(tree, dict) and value.keys() != tree.keys()):
        message = f"a hook on {pending.path} changes the structure of the layer's {what}"
        raise GraftError("GC043", message, hint=_HINT)
    names = list(tree) if isinstance(tree, dict) else range(len(tree))
    for name in names:
        yield from _paired(pending, tree[name], value[name], what)


def tree_of(value: Any, of_leaf: Callable[[Any, str], Leaf], name: str = "") -> Any:
    """Return the tree of leaves for a layer's arguments or results.

    Args:
        value: tuples, lists and dictionaries that contain any values.
        of_leaf: a function that creates a leaf from a value and the name of the leaf.
        name: the name of the tree.
    """
    inner = f"{name}." if name else ""
    if isinstance(value, dict) and (type(value) is dict or is_dataclass(value)):  # or a transformers output class
        members = {each: tree_of(item, of_leaf, f"{inner}{each}") for each, item in value.items()}
        return members if type(value) is dict else type(value)(**members)
    if type(value) in (tuple, list):
        return type(value)(tree_of(item, of_leaf, f"{inner}{at}") for at, item in enumerate(value))
    return of_leaf(value, name or "its result")


def apart(one: Tensor, other: Any) -> float:
    """Return the distance between a graph value and a source value, relative to the largest element.

    The distance is infinite if the types, shapes or dtypes differ. Elements that are non-finite in both are ignored,
    because padding may attend to nothing, which gives NaN in both.
    """
    if not isinstance(other, Tensor) or one.shape != other.shape or one.dtype != other.dtype:
        return float("inf")
    other = other.to(one.device)
    if torch.equal(one, other):
        return 0.0
    if not one.is_floating_point() or not torch.equal(one.isfinite(), other.isfinite()):
        return float("inf")
    real = one.isfinite()
    scale = float(one[real].abs().max()) if real.any() else 0.0
    return float((one - other)[real].abs().max()) / scale if scale else float("inf")
