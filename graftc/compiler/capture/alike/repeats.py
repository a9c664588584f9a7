"""Layers that are alike are traced once: what the tracer records for one of them replaces the others.

If a layer is called with arguments of the same types, and in the same state of torch, as an earlier one that holds the
same (`modules`), its ``forward`` does not run. While the tracer is at work, an operator that computes nothing
represents the call (`traced_once`); afterwards `written` replaces it by the nodes of the first call, over the layer's
own tensors.

Integers may differ between layers that are alike, since most know their own position, unless ``forward`` reads them:
reads are recorded. A call is not reused if its forward pass does anything besides returning its result, or depends on
anything else: attributes and arguments that it changes; values that something outside of the layer uses; values that
are neither arguments nor the layer's tensors; sizes that depend on data. Of a cache, a layer may read and write its own
part (`caches`). The last layer is traced as well, and has to do the same as the one that was reused.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from graftc.compat.hooks import FORWARD
from graftc.compat.modes import modes_in_force
from graftc.compat.modules import buffers_of
from graftc.compiler.capture.alike.caches import CrossedCache, LayerNumber, crossed
from graftc.compiler.capture.alike.hidden import Hidden
from graftc.compiler.capture.alike.modules import Layer, Place, alike
from graftc.compiler.capture.assignments import Attributes
from graftc.passes.core.ir.shapes import expression

_LIBRARY: Any = torch.library.Library("graftc_capture", "DEF")  # type: ignore[no-untyped-call]
_LIBRARY.define("begin(int call, Tensor[] inputs) -> ()")
_LIBRARY.define("end(int call, Tensor[] outputs) -> ()")
_LIBRARY.define("again(int call, int layer, Tensor[] inputs) -> Tensor[]")
BEGIN: Any = torch.ops.graftc_capture.begin.default
"""Stands in front of what is traced of a call: its number, the tensors that it is given."""
END: Any = torch.ops.graftc_capture.end.default
"""Stands behind it: its number, the tensors that it made."""
AGAIN: Any = torch.ops.graftc_capture.again.default
"""Stands for a call that is not traced: the number of the one that was, the layer's, the tensors that it is given."""
for _mark in (BEGIN, END):
    fx.node.has_side_effect(_mark)  # keeps it in the graph although its result is unused


@dataclass(eq=False)
class TracedCall:
    """A call of a layer.

    Attributes:
        number: the number of the call.
        layer: the layer that is called.
        arguments: the number of tensors that it was called with, except those in caches.
        key: what another call must have in common with it, apart from numbers.
        read: the numbers of the layer that were read.
        caches: the caches that it was called with.
        result: how its result is assembled from given and created tensors.
        parts: how its own part of each cache is assembled after the call.
        made: the types of the tensors that it created.
        given: the indices, among all tensors that it was given, of its arguments and of the tensors in caches that
            belong to its part.
        slots: the numbers of the layer that select its own part of a cache.
        reusable: whether it changed nothing else that is visible from outside.
    """

    number: int
    layer: Layer
    arguments: int
    key: Any
    caches: list[CrossedCache] = field(default_factory=list)
    read: set[Place] = field(default_factory=set)
    result: Any = None
    parts: Any = None
    made: list[tuple[Any, ...]] = field(default_factory=list)
    given: list[int] = field(default_factory=list)
    slots: set[Place] = field(default_factory=set)
    reusable: bool = False

    def stands_for(self, other: TracedCall) -> bool:
        """Return whether this call, whose reads are known, describes what another one does."""
        same = all(self.layer.numbers[place] == other.layer.numbers[place] for place in self.read)
        if not same or self is other or self.layer.group is not other.layer.group or self.key != other.key:
            return False
        own, others = self.slot(self.layer), self.slot(other.layer)
        return own is None or (others is not None and self.told_parts(own)[0] == other.told_parts(others)[0])

    def slot(self, layer: Layer) -> int | None:
        """Return the place of a layer's part of each cache, according to this call.

        It is None if the call has looked for no part, or if the layer's numbers disagree.
        """
        numbers = {layer.numbers[place] for place in self.slots}
        return next(iter(numbers)) if len(numbers) == 1 else None

    def told_parts(self, number: int) -> tuple[Any, list[Tensor]]:
        """Return the parts at a place as data, and their tensors."""
        tensors: list[Tensor] = []
        return [_told(cache.part(number), tensors) for cache in self.caches], tensors


class Repeats:
    """The calls that were traced once, and the calls that they represent.

    Attributes:
        layers: the layers that are like others.
        hidden: the layers among them whose tensors are hidden from the tracer.
        calls: their traced calls, by number.
        reused: the number of calls that were not traced.
    """

    def __init__(self, layers: Sequence[Layer], hidden: Hidden) -> None:
        self.layers, self.hidden = layers, hidden
        self.calls: list[TracedCall] = []
        self.reused = 0
        self._number = {id(layer): number for number, layer in enumerate(layers)}
        self._open: TracedCall | None = None

    def restart(self) -> None:
        """Forget what was traced, because the tracer starts again."""
        self.calls, self.reused, self._open = [], 0, None

    def call(self, layer: Layer, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Run a call of a layer while the model is traced, or reuse one that was traced before."""
        tensors: list[Tensor] = []
        caches: list[CrossedCache] = []
        given = [list(args), kwargs]
        try:
            told = _told(given, tensors, caches)
        except _UntoldError:
            return forward(*args, **kwargs)
        if self._open is not None:  # a layer within a layer is part of the outer one
            return forward(*args, **kwargs)
        call = TracedCall(len(self.calls), layer, len(tensors), [told, _state(layer.module)], caches)
        known = next((one for one in self.calls if one.reusable and one.stands_for(call)), None)
        if known is None or layer.is_last:
            self.calls.append(call)
            return self._traced(call, tensors, given, lambda: forward(*args, **kwargs))
        return self._put(known, call, tensors)

    def _put(self, known: TracedCall, call: TracedCall, tensors: list[Tensor]) -> Any:
        """Return the result of a call, and update its caches, from a call that was traced."""
        self.reused += 1
        number = known.slot(call.layer)
        given = tensors if number is None else [*tensors, *call.told_parts(number)[1]]
        outputs = AGAIN(known.number, self._number[id(call.layer)], given)
        if number is not None:
            for cache, part in zip(call.caches, known.parts, strict=True):
                cache.put(number, _put_together(part, given, outputs, call.caches))
        return _put_together(known.result, given, outputs, call.caches)

    def _traced(self, call: TracedCall, tensors: list[Tensor], given: Any, run: Callable[[], Any]) -> Any:
        modules = list(call.layer.module.modules())
        before = [(module, Attributes(module), dict(buffers_of(module))) for module in modules]
        inside = [tensor for cache in call.caches for tensor in cache.tensors]
        BEGIN(call.number, [*tensors, *inside])
        self._open = call
        more: list[None] = []
        try:
            with ExitStack() as stack:
                for cache in call.caches:
                    stack.enter_context(cache.watched(lambda: more.append(None)))
                result = run()
        finally:
            self._open = None
        outputs: list[Tensor] = []
        after: list[Tensor] = []
        try:
            number = call.slot(call.layer)
            own = [] if number is None else call.told_parts(number)[1]
            at = [next(i for i, tensor in enumerate(inside) if tensor is each) for each in own]
            call.given = [*range(len(tensors)), *(len(tensors) + i for i in at)]
            operands = [*tensors, *own]
            call.result = _taken_apart(result, operands, outputs, call.caches)
            written = [cache.written(number) for cache in call.caches]
            call.parts = [_taken_apart(part, operands, outputs, call.caches) for part in written if part is not None]
            same = _told(given, after, []) == call.key[0] and all(a is b for a, b in zip(after, tensors, strict=True))
            unchanged = [
                not snapshot.changed() and _same(buffers_of(module), buffers) for module, snapshot, buffers in before
            ]
            call.reusable = same and all(unchanged) and not more and len(call.parts) == len(written)
            call.reusable &= number is not None or not call.slots
        except _UntoldError:
            outputs.clear()
        call.made = [(t.dtype, t.device, tuple(t.shape), t.stride()) for t in outputs]
        END(call.number, outputs)
        return result

    def read(self, place: Place, value: Any) -> Any:
        """Record that a number of a layer is read, and return the value that represents it."""
        call = self._open
        if call is None or not call.caches or type(value) is not int:
            if call is not None:
                call.read.add(place)
            return value
        return LayerNumber(value, lambda: call.read.add(place), lambda: call.slots.add(place))


_TRACING: list[Repeats] = []


def _nothing(call: int, tensors: list[Tensor]) -> None:
    return None


def _again(call: int, layer: int, inputs: list[Tensor]) -> list[Tensor]:
    types = _TRACING[-1].calls[call].made
    return [torch.empty_strided(size, stride, dtype=dtype, device=device) for dtype, device, size, stride in types]


for _name, _fake in (("begin", _nothing), ("end", _nothing), ("again", _again)):
    torch.library.register_fake(f"graftc_capture::{_name}", _fake, lib=_LIBRARY)


@contextmanager
def traced_once(model: nn.Module, inputs: Mapping[str, Tensor] | None = None) -> Iterator[Repeats]:
    """Let the tracer run one of the layers that are alike while the block runs; operators represent the others.

    Args:
        model: any module, in its capture state; it is restored afterwards.
        inputs: the model's inputs by name, if tensors of the other layers are to be hidden from the tracer, see
            `graftc.compiler.capture.alike.hidden`.
    """
    layers = alike(model)
    repeats = Repeats(layers, Hidden([] if inputs is None else layers, inputs or {}))
    with ExitStack() as stack:
        for layer in repeats.layers:
            stack.enter_context(_called_through(repeats, layer))
        stack.enter_context(_watched(repeats))
        _TRACING.append(repeats)
        stack.callback(_TRACING.pop)
        yield repeats


@contextmanager
def _called_through(repeats: Repeats, layer: Layer) -> Iterator[None]:
    original = layer.module.forward

    @functools.wraps(original)
    def forward(*args: Any, **kwargs: Any) -> Any:
        return repeats.call(layer, original, args, kwargs)

    vars(layer.module)["forward"] = forward
    try:
        yield
    finally:
        del vars(layer.module)["forward"]


class _Watched:
    """A descriptor for an attribute whose value the instances of a class keep; it reports every read."""

    def __init__(self, name: str, read: Callable[[nn.Module, str, Any], Any]) -> None:
        self._name, self._read = name, read

    def __get__(self, owner: nn.Module | None, kind: type) -> Any:
        if owner is None or self._name not in vars(owner):
            raise AttributeError(self._name)
        return self._read(owner, self._name, vars(owner)[self._name])

    def __set__(self, owner: nn.Module, value: Any) -> None:
        vars(owner)[self._name] = value

    def __delete__(self, owner: nn.Module) -> None:
        if self._name not in vars(owner):
            raise AttributeError(self._name)
        del vars(owner)[self._name]


@contextmanager
def _watched(repeats: Repeats) -> Iterator[None]:
    """Record reads of the numbers in which layers of a group differ while the block runs."""
    paths: dict[int, str] = {}
    watched: set[tuple[type, str]] = set()
    for layer in repeats.layers:
        parts, first = dict(layer.module.named_modules()), layer.group[0].numbers
        paths |= {id(part): path for path, part in parts.items()}
        watched |= {(type(parts[at]), name) for (at, name), n in layer.numbers.items() if n != first[at, name]}

    def read(module: nn.Module, name: str, value: Any) -> Any:
        return repeats.read((paths[id(module)], name), value) if id(module) in paths else value

    try:
        for kind, name in watched:
            setattr(kind, name, _Watched(name, read))
        yield
    finally:
        for kind, name in watched:
            delattr(kind, name)


# --- what a call depends on, and what it returns -----------------------------------------------------------


class _UntoldError(Exception):
    """Raised for a value of a kind that cannot be inspected."""


_PLAIN = (bool, int, float, str, type(None), torch.dtype, torch.device)


def _told(value: Any, tensors: list[Tensor], caches: list[CrossedCache] | None = None) -> Any:
    """Return a value as data, in which tensors are described by their types and by which of them are the same object.

    Tensors are collected in order, and so are caches if ``caches`` is given.
    """
    if type(value) in _PLAIN:
        return [type(value), value]
    if isinstance(value, Tensor):
        at = next((i for i, known in enumerate(tensors) if known is value), None)
        if at is not None:
            return ["known", at]
        if value.layout != torch.strided or value.is_conj() or value.is_neg():
            raise _UntoldError
        tensors.append(value)
        sizes = [expression(size) for size in (*value.shape, *value.stride(), value.storage_offset())]
        return ["new", value.dtype, value.device, value.dim(), sizes, value.requires_grad, type(value)]
    if type(value) in (list, tuple):
        return [type(value), [_told(item, tensors, caches) for item in value]]
    if type(value) is dict:
        return [dict, [(_told(key, tensors), _told(item, tensors, caches)) for key, item in value.items()]]
    if caches is not None and (cache := crossed(value)) is not None:
        if not any(known.cache is value for known in caches):
            caches.append(cache)
        return ["cache", [known.cache is value for known in caches].index(True), cache.described]
    raise _UntoldError


def _taken_apart(value: Any, given: list[Tensor], created: list[Tensor], caches: Sequence[CrossedCache]) -> Any:
    """Return a result as data; tensors become indices among the given or the created ones, which are collected."""
    if isinstance(value, Tensor):
        for kind, known in (("given", given), ("made", created)):
            at = next((i for i, tensor in enumerate(known) if tensor is value), None)
            if at is not None:
                return kind, at
        if value.layout != torch.strided or value.is_conj() or value.is_neg() or value.requires_grad:
            raise _UntoldError
        created.append(value)
        return "made", len(created) - 1
    if type(value) in (list, tuple):
        return type(value), [_taken_apart(item, given, created, caches) for item in value]
    if type(value) is dict:
        return dict, [_taken_apart(item, given, created, caches) for item in value.items()]
    if type(value) in _PLAIN:
        return "plain", value
    at = next((i for i, known in enumerate(caches) if known.cache is value), None)
    if at is not None:
        return "cache", at
    raise _UntoldError


def _put_together(data: Any, given: Sequence[Tensor], created: Sequence[Tensor], caches: Sequence[CrossedCache]) -> Any:
    kind, content = data
    if kind in ("given", "made"):
        return (given if kind == "given" else created)[content]
    if kind == "cache":
        return caches[content].cache
    return content if kind == "plain" else kind(_put_together(item, given, created, caches) for item in content)


def _state(module: nn.Module) -> Any:
    """Return what else a forward pass depends on: the state of torch, the modes of modules, the number of inner hooks.

    Hooks of the layer itself run in any case.
    """
    autocast = [
        (kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
        for kind in ("cpu", "cuda", "mps", "xpu")
        if torch.amp.is_autocast_available(kind)
    ]
    state = [torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.get_default_dtype(), autocast]
    others = [vars(each) for each in module.modules() if each is not module]
    inside = [(each["training"], *(len(each[table]) for table in FORWARD)) for each in others]
    return [state, modes_in_force(), module.training, inside]


def _same(now: dict[str, Any], before: dict[str, Any]) -> bool:
    return now.keys() == before.keys() and all(now[name] is value for name, value in before.items())
