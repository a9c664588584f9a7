"""Calls of layers in the source's form: the values that hooks on a layer get and may change.

A graph calls a layer with whatever values its part of the graph reads, in any order, and gets whatever values the other
parts read of it, such as keys and values for a cache. Hooks are written for the source's layers. A layer with hooks is
therefore called with the arguments of the source's layer, and returns the results of that. The values of the graph that
correspond to these are found by running the source model once on a sample, with the graph beside it, and comparing
values.
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
    """A placeholder that a hook gets for a value of the source that the graph lacks, or has in another form.

    It may be passed on; any other use raises.

    Raises:
        GraftError: GC043 for any use.
    """

    def __init__(self, name: str, path: str) -> None:
        vars(self).update(_name=name, _path=path)

    def __repr__(self) -> str:
        return f"<{self._name} of {self._path}, which the graph does not have>"

    def _refuse(self, *_: Any, **__: Any) -> Any:
        message = f"a hook on {self._path} looks into {self._name}, a value that the graph does not have in this form"
        raise GraftError("GC043", message, hint=_HINT)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self._refuse()

    __getitem__ = __len__ = __iter__ = __bool__ = __add__ = __radd__ = __mul__ = __rmul__ = _refuse
    __sub__ = __rsub__ = __truediv__ = __matmul__ = __neg__ = __float__ = __int__ = _refuse


@dataclass(frozen=True)
class Leaf:
    """A place in the arguments or the results of a layer.

    Attributes:
        name: the name of the place, for messages.
        at: the index of its value among those of the graph; None if it is not in the graph.
        value: the value if it is not in the graph.
        cache: whether it is the cache of the call.
    """

    name: str
    at: int | None = None
    value: Any = None
    cache: bool = False


@dataclass(frozen=True)
class LayerCall:
    """The form in which the source calls a layer, and the values of a graph in it.

    Attributes:
        args, kwargs, results: trees of `Leaf`.
        called: whether the source calls the layer at all; a list of layers is never called.
    """

    args: Any
    kwargs: Any
    results: Any
    called: bool = True


def unknown_call(path: str) -> LayerCall:
    """Return the call of a layer that the source does not call as often as the graph does."""
    arguments, results = (Leaf(name, value=NotInGraph(name, path)) for name in ("its arguments", "its results"))
    return LayerCall((arguments,), {}, results)


@dataclass
class Hearing:
    """The hooks that observe calls of a model's layers.

    Attributes:
        hooked: whether a layer has hooks of its own.
        everywhere: whether there have been hooks on every module of the process.
        live: whether the source's own modules call the layers, and their hooks.
    """

    hooked: bool = False
    everywhere: bool = False
    live: bool = False


@dataclass
class Running:
    """A call of a model whose layers have hooks.

    Attributes:
        learn: function that finds out how layers are called in the graph that runs.
        module_calls: function that returns how modules below layers are called there, by their paths.
        module: the model.
        cache: the cache of the call; None if it has none.
        begun: modules that have begun and not ended, with their arguments, the innermost last.
    """

    learn: Callable[[], None]
    module_calls: Callable[[], Mapping[str, LayerCall]]
    module: nn.Module
    cache: Any
    begun: list[tuple[str, Any, Any]] = field(default_factory=list)


@dataclass
class Pending:
    """The state of a call of a layer between its graph and its hooks."""

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
    """The calls of the current thread, the innermost last."""

    def __init__(self) -> None:
        self.running: list[Running] = []
        self.pending: list[Pending] = []


_stacks = _Stacks()


@contextmanager
def running(call: Running) -> Iterator[None]:
    """Call layers with hooks in the source's form while the block runs, and hooks on other modules as well."""
    _stacks.running.append(call)
    try:
        yield
    finally:
        _stacks.running.pop()


def running_call() -> Running | None:
    """Return the innermost call of a model with hooks in this thread; None if there is none."""
    return _stacks.running[-1] if _stacks.running else None


def hooks_everywhere() -> bool:
    """Return whether there are hooks on every module of the process."""
    return has_global_hooks()


def is_heard(module: nn.Module) -> bool:
    """Return whether a layer, or a wrapper that other libraries have put around it, has hooks that look at values."""
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
    """Call a layer in the form in which the source calls it.

    Args:
        owner: the code of the layer.
        module: the layer, or the wrapper around it.
        key: the name of its code in the graph.
        inputs: the values that the code reads.

    Returns:
        The results of the code, with the changes that hooks have made.
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
    """Return the call that a layer's ``forward`` has to run; None if none has been prepared."""
    last = _stacks.pending[-1] if _stacks.pending else None
    return last if last is not None and last.owner is owner and not last.ran else None


def inputs_of(pending: Pending, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Any]:
    """Return the values that a layer's code reads, with the changes that hooks have made to its arguments.

    Raises:
        GraftError: GC043 if hooks have changed what the graph does not have.
    """
    trees = pending.call.args, pending.call.kwargs
    return _with_changes(pending, pending.inputs, trees, (args, dict(kwargs)), "arguments")


def given(pending: Pending, raw: Any) -> Any:
    """Return the result of a layer's ``forward``, given the results of its code."""
    outputs = raw if isinstance(raw, tuple | list) else (raw,)
    pending.raw, pending.ran = raw, True
    pending.shown = shown(pending.call.results, outputs, pending.cache)
    return pending.shown


def taken(pending: Pending, result: Any) -> Any:
    """Return the results with which the graph continues, given the result after the hooks."""
    if result is pending.shown:
        return pending.raw
    single = not isinstance(pending.raw, tuple | list)
    outputs = [pending.raw] if single else pending.raw
    outputs = _with_changes(pending, outputs, pending.call.results, result, "results")
    return outputs[0] if single else tuple(outputs)


def _with_changes(pending: Pending, values: Sequence[Any], tree: Any, changed: Any, what: str) -> list[Any]:
    """Return values of the graph with the changes that hooks have made to what they were shown of them.

    Args:
        pending: the call.
        values: the values.
        tree: the leaves of what the hooks were shown.
        changed: the same as the hooks have left it.
        what: what it is, for messages.
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
        raise GraftError("GC043", f"a hook on {pending.path} makes {other} of {name}, which is {one}", hint=_HINT)
    return value


def _described(value: Any) -> str:
    if not isinstance(value, Tensor):
        return f"a {type(value).__name__}"
    return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"


def shown(tree: Any, values: Sequence[Any], cache: Any) -> Any:
    """Return what hooks get for a tree of leaves, given the values of the graph and the cache of the call."""
    if isinstance(tree, Leaf):
        outside = cache if tree.cache else tree.value
        return outside if tree.at is None else values[tree.at]
    if isinstance(tree, dict):
        members = {name: shown(each, values, cache) for name, each in tree.items()}
        return members if type(tree) is dict else type(tree)(**members)
    return type(tree)(shown(each, values, cache) for each in tree)


def _paired(pending: Pending, tree: Any, value: Any, what: str) -> Iterator[tuple[Leaf, Any]]:
    """Yield the leaves of a tree, each with the value in its place.

    Raises:
        GraftError: GC043 if the value does not have the structure of the tree.
    """
    if isinstance(tree, Leaf):
        yield tree, value
        return
    alike = isinstance(value, dict) if isinstance(tree, dict) else isinstance(value, tuple | list)
    if not alike or len(value) != len(tree) or (isinstance(tree, dict) and value.keys() != tree.keys()):
        message = f"a hook on {pending.path} puts its {what} together in another way than the layer does"
        raise GraftError("GC043", message, hint=_HINT)
    names = list(tree) if isinstance(tree, dict) else range(len(tree))
    for name in names:
        yield from _paired(pending, tree[name], value[name], what)


def tree_of(value: Any, of_leaf: Callable[[Any, str], Leaf], name: str = "") -> Any:
    """Return the tree of leaves for the arguments or results of a layer.

    Args:
        value: tuples, lists and dictionaries that contain any values.
        of_leaf: function that creates a leaf from the value in a place and the name of the place.
        name: the name of the tree.
    """
    inner = f"{name}." if name else ""
    if isinstance(value, dict) and (type(value) is dict or is_dataclass(value)):  # or an output class of transformers
        members = {each: tree_of(item, of_leaf, f"{inner}{each}") for each, item in value.items()}
        return members if type(value) is dict else type(value)(**members)
    if type(value) in (tuple, list):
        return type(value)(tree_of(item, of_leaf, f"{inner}{at}") for at, item in enumerate(value))
    return of_leaf(value, name or "its result")


def apart(one: Tensor, other: Any) -> float:
    """Return the distance between a value of a graph and one of the source, relative to the largest element.

    It is infinite if the values are not of the same kind. Elements that are not finite in both are ignored: padding may
    attend to nothing, which gives NaN in both.
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
