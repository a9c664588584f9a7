"""Layers as their source's are called: what hooks on a layer see, and may change.

A graph calls a layer with whatever its part of the graph reads, in any order, and gets whatever others read of it: keys
and values for a cache among them. Hooks are written for the source's layers. Where a layer has hooks, it is therefore
called with the arguments of the source's, and gives what that gives. Which values of the graph these are is found by
running the source model once on a sample, with the graph beside it, and comparing values.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, is_dataclass
from typing import Any

import torch
import torch.nn.modules.module as torch_module
from torch import Tensor, nn

from graftc.passes.core.weights.containers import OWN, of_fsdp
from graftc.specs.errors.diagnostics import GraftError

_TABLES = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_HINT = "put the hook on the compiled model or on the source model"


class NotInGraph:
    """What a hook gets in place of a value of the source's that the graph does not have, or has in another form. It
    may be passed on; whoever looks into it is refused.

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
        name: for messages.
        at: which value of the graph it is; None where it is not in the graph.
        held: what it is otherwise.
        cache: whether it is the cache of the call.
    """

    name: str
    at: int | None = None
    held: Any = None
    cache: bool = False


@dataclass(frozen=True)
class LayerCall:
    """How a layer of the source is called, and what of it is which value of a graph.

    Attributes:
        args, kwargs, results: trees of `Leaf`.
        called: whether the source calls it at all: a list of layers is not.
    """

    args: Any
    kwargs: Any
    results: Any
    called: bool = True


def unknown_call(path: str) -> LayerCall:
    """Of a layer that the source does not call as often as the graph."""
    arguments, results = (Leaf(name, held=NotInGraph(name, path)) for name in ("its arguments", "its results"))
    return LayerCall((arguments,), {}, results)


@dataclass
class Hearing:
    """Who hears of calls of a model's layers.

    Attributes:
        hooked: a layer has hooks of its own.
        everywhere: there have been hooks on every module of the process.
        live: the source's own modules call the layers, and their hooks.
    """

    hooked: bool = False
    everywhere: bool = False
    live: bool = False


@dataclass
class Running:
    """A call of a model whose layers have hooks.

    Attributes:
        learn: finds out how layers are called in the graph that runs.
        module_calls: gives how modules below layers are called there, by their paths.
        module: the model.
        cache: of the call; None where it has none.
        begun: modules that have begun and not ended, with their arguments, the innermost last.
    """

    learn: Callable[[], None]
    module_calls: Callable[[], Mapping[str, LayerCall]]
    module: nn.Module
    cache: Any
    begun: list[tuple[str, Any, Any]] = field(default_factory=list)


@dataclass
class Pending:
    """A call of a layer between its graph and its hooks."""

    owner: Any
    path: str
    key: str
    inputs: Sequence[Any]
    call: LayerCall
    given: list[Any] = field(default_factory=list)
    raw: Any = None
    shown: Any = None
    ran: bool = False


class _Stacks(threading.local):
    """Calls of this thread, the innermost last."""

    def __init__(self) -> None:
        self.running: list[Running] = []
        self.pending: list[Pending] = []


_stacks = _Stacks()


@contextmanager
def running(call: Running) -> Iterator[None]:
    """Inside, layers with hooks are called as the source's, and hooks on other modules hear of calls."""
    _stacks.running.append(call)
    try:
        yield
    finally:
        _stacks.running.pop()


def running_call() -> Running | None:
    """The call of a model with hooks that this thread is in."""
    return _stacks.running[-1] if _stacks.running else None


def is_running() -> bool:
    """Whether this thread is in a call of a model whose layers may have hooks."""
    return bool(_stacks.running)


def hooks_everywhere() -> bool:
    """Whether there are hooks on every module of the process."""
    return bool(torch_module._has_any_global_hook())  # type: ignore[no-untyped-call]


def is_heard(module: nn.Module) -> bool:
    """Whether a layer, or what others have put around it, has hooks that look at values."""
    if hooks_everywhere():
        return True
    own = (module, *_within(module))
    tables = (vars(each)[name] for each in own for name in _TABLES)
    return any(not of_fsdp(hook) for table in tables for hook in table.values())


def _within(module: nn.Module) -> Iterator[nn.Module]:
    """The layer that others have put modules around."""
    while OWN not in vars(module) and len(module._modules) == 1:
        (inner,) = module._modules.values()
        if inner is None:
            return
        yield (module := inner)


def enter(owner: Any, module: Any, key: str, inputs: Sequence[Any]) -> Any:
    """Call a layer as the source's is called.

    Args:
        owner: its code.
        module: the layer, or what others have put around it.
        key: the name of its code in the graph.
        inputs: what that reads.

    Returns:
        What the code gives, with what hooks have changed in it.
    """
    run = _stacks.running[-1]
    path = type(module).__name__
    if key not in owner.calls:
        run.learn()
    call = owner.calls.get(key) or unknown_call(path)
    pending = Pending(owner, path, key, inputs, call)

    def shown(leaf: Leaf) -> Any:
        at_hand = run.cache if leaf.cache else leaf.held
        found = at_hand if leaf.at is None else inputs[leaf.at]
        pending.given.append(found)
        return found

    args, kwargs = mapped(call.args, shown), mapped(call.kwargs, shown)
    _stacks.pending.append(pending)
    try:
        found = module(*args, **kwargs)
    finally:
        _stacks.pending.pop()
    return taken(pending, found)


def pending_for(owner: Any) -> Pending | None:
    """The call that a layer's ``forward`` is to run; None where nobody has prepared one."""
    last = _stacks.pending[-1] if _stacks.pending else None
    return last if last is not None and last.owner is owner and not last.ran else None


def inputs_of(pending: Pending, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Any]:
    """What a layer's code reads, with what hooks have changed in its arguments.

    Raises:
        GraftError: GC043 where they have changed what the graph does not have.
    """
    inputs = list(pending.inputs)
    before = iter(pending.given)
    for leaf, value in _paired(pending, (pending.call.args, pending.call.kwargs), (args, dict(kwargs)), "arguments"):
        was = next(before)
        if value is was:
            continue
        if leaf.at is None:
            raise _unchangeable(pending, leaf.name)
        inputs[leaf.at] = _alike(pending, leaf.name, was, value)
    return inputs


def given(pending: Pending, raw: Any) -> Any:
    """What a layer's ``forward`` returns where its code has given something."""
    outputs = raw if isinstance(raw, tuple | list) else (raw,)
    pending.raw, pending.ran = raw, True
    pending.shown = mapped(pending.call.results, lambda leaf: leaf.held if leaf.at is None else outputs[leaf.at])
    return pending.shown


def taken(pending: Pending, found: Any) -> Any:
    """What the graph goes on with."""
    if found is pending.shown:
        return pending.raw
    single = not isinstance(pending.raw, tuple | list)
    outputs = [pending.raw] if single else list(pending.raw)
    for leaf, value in _paired(pending, pending.call.results, found, "results"):
        was = leaf.held if leaf.at is None else outputs[leaf.at]
        if value is was:
            continue
        if leaf.at is None:
            raise _unchangeable(pending, leaf.name)
        outputs[leaf.at] = _alike(pending, leaf.name, was, value)
    return outputs[0] if single else tuple(outputs)


def _alike(pending: Pending, name: str, was: Any, value: Any) -> Any:
    if not isinstance(value, Tensor) or value.shape != was.shape or value.dtype != was.dtype:
        one, other = (_described(each) for each in (was, value))
        raise GraftError("GC043", f"a hook on {pending.path} makes {other} of {name}, which is {one}", hint=_HINT)
    return value


def _described(value: Any) -> str:
    if not isinstance(value, Tensor):
        return f"a {type(value).__name__}"
    return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"


def _unchangeable(pending: Pending, name: str) -> GraftError:
    message = f"a hook on {pending.path} changes {name}, a value that the graph does not have in this form"
    return GraftError("GC043", message, hint=_HINT)


def mapped(tree: Any, of_leaf: Callable[[Leaf], Any]) -> Any:
    """A tree of values for a tree of leaves."""
    if isinstance(tree, Leaf):
        return of_leaf(tree)
    if isinstance(tree, dict):
        made = {name: mapped(each, of_leaf) for name, each in tree.items()}
        return made if type(tree) is dict else type(tree)(**made)
    return type(tree)(mapped(each, of_leaf) for each in tree)


def _paired(pending: Pending, tree: Any, value: Any, what: str) -> Iterator[tuple[Leaf, Any]]:
    """Leaves with what stands in their places.

    Raises:
        GraftError: GC043 where it is not put together alike.
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
    """The tree of leaves of a layer's arguments or results.

    Args:
        value: tuples, lists and dictionaries with anything in them.
        of_leaf: makes a leaf of what stands in one place, and the name of the place.
        name: of all of it.
    """
    inner = f"{name}." if name else ""
    if isinstance(value, dict) and (type(value) is dict or is_dataclass(value)):  # or an output class of transformers
        made = {each: tree_of(item, of_leaf, f"{inner}{each}") for each, item in value.items()}
        return made if type(value) is dict else type(value)(**made)
    if type(value) in (tuple, list):
        return type(value)(tree_of(item, of_leaf, f"{inner}{at}") for at, item in enumerate(value))
    return of_leaf(value, name or "its result")


def apart(one: Tensor, other: Any) -> float:
    """How far a value of a graph is from one of the source's, over the largest element: infinite where it is not of
    the same kind. Padding may see nothing, which is not a number in both."""
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
