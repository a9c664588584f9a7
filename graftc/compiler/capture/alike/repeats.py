"""Trace alike layers only once: the nodes that the tracer records for one of them replace the calls to the others.

If a layer is called with arguments of the same types, and in the same state of torch, as an earlier layer with the same
contents (`modules`), its ``forward`` does not run. During tracing, an operator that computes nothing represents the
call (`traced_once`); afterwards, `written` replaces it with the nodes of the first call, applied to the layer's own
tensors.

Most layers store their own position, so alike layers may differ in integers that ``forward`` does not read: reads are
recorded. A call is not reused if its forward pass does anything besides returning its result, or depends on anything
besides its arguments and the layer's tensors: if it changes attributes or arguments, if code outside the layer uses
values from inside it, if it reads other values, or if sizes depend on data. In a cache, a layer may read and write its
own part (`caches`). The last layer is traced as well, and must do the same as the layer whose call was reused.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor, fx, nn

from graftc.compat import pytree
from graftc.compat.hooks import FORWARD
from graftc.compat.modes import modes_in_force
from graftc.compat.modules import buffers_of
from graftc.compiler.capture.alike.caches import CrossedCache, LayerNumber, crossed
from graftc.compiler.capture.alike.hidden import Hidden
from graftc.compiler.capture.alike.modules import Layer, Place, alike, can_be_watched
from graftc.compiler.capture.as_captured import replaced
from graftc.compiler.capture.assignments import Attributes, has_same_items
from graftc.passes.core.elements.layer_cache import LAYER_INDEX
from graftc.passes.core.ir.shapes import expression

_LIBRARY: Any = torch.library.Library("graftc_capture", "DEF")  # type: ignore[no-untyped-call]
_LIBRARY.define("mark(bool begins, int call, Tensor[] tensors) -> ()")
_LIBRARY.define("again(int call, int layer, Tensor[] inputs) -> Tensor[]")
MARK: Any = torch.ops.graftc_capture.mark.default
"""Marks the beginning and the end of a traced call, with the call's number and its input or output tensors."""
AGAIN: Any = torch.ops.graftc_capture.again.default
"""Represents an untraced call by the number of the corresponding traced call, the layer's number and the inputs."""
fx.node.has_side_effect(MARK)  # keeps it in the graph although its result is unused


@dataclass(eq=False)
class TracedCall:
    """A call to a layer.

    Attributes:
        number: the number of the call.
        layer: the layer that is called.
        arguments: the number of tensors in its arguments, except those in caches.
        key: the data that another call must have in common with it, apart from integers of the layers.
        read: the integers of the layer that were read.
        caches: the caches among its arguments.
        result: how its result is assembled from given and created tensors.
        parts: how its own part of each cache is assembled after the call.
        created: the types of the tensors that it created.
        given: the indices, among all tensors passed to it, of its arguments and of the tensors in its own part of the
            caches.
        slots: the integers of the layer that select its own part of a cache.
        reusable: whether the call had no other effect that is visible from outside.
    """

    number: int
    layer: Layer
    arguments: int
    key: Any
    caches: list[CrossedCache] = field(default_factory=list)
    read: set[Place] = field(default_factory=set)
    result: Any = None
    parts: Any = None
    created: list[tuple[Any, ...]] = field(default_factory=list)
    given: list[int] = field(default_factory=list)
    slots: set[Place] = field(default_factory=set)
    reusable: bool = False

    def stands_for(self, other: TracedCall) -> bool:
        """Return whether this call, whose reads are known, does the same as another call."""
        same = all(self.layer.numbers[place] == other.layer.numbers[place] for place in self.read)
        if not same or self is other or self.layer.group is not other.layer.group or self.key != other.key:
            return False
        own, others = self.slot(self.layer), self.slot(other.layer)
        return own is None or (others is not None and self.told_parts(own)[0] == other.told_parts(others)[0])

    def slot(self, layer: Layer) -> int | None:
        """Return the index of a layer's part in each cache, according to this call.

        Return None if the call selected no part, or if the layer's integers disagree.
        """
        numbers = {layer.numbers[place] for place in self.slots}
        return next(iter(numbers)) if len(numbers) == 1 else None

    def told_parts(self, number: int) -> tuple[Any, list[Tensor]]:
        """Return, as data, the part at an index of each cache, and the tensors in these parts."""
        tensors: list[Tensor] = []
        return [_told(cache.part(number), tensors) for cache in self.caches], tensors


class Repeats:
    """The calls that were traced once, and the calls that they represent.

    Args:
        layers: the layers that are like others; by default all layers are traced.
        inputs: the model's inputs by name, if tensors of layers should be hidden from the tracer.

    Attributes:
        hidden: those of the layers whose tensors are hidden.
        calls: the traced calls to these layers, by number.
        reused: the number of calls that were not traced.
    """

    def __init__(self, layers: Sequence[Layer] = (), inputs: Mapping[str, Tensor] | None = None) -> None:
        self.layers, self.hidden = layers, Hidden(() if inputs is None else layers, inputs or {})
        self.calls: list[TracedCall] = []
        self.reused = 0
        self._number = {id(layer): number for number, layer in enumerate(layers)}
        self._open: TracedCall | None = None

    def restart(self) -> None:
        """Discard the recorded calls, because the tracer starts again."""
        self.calls, self.reused, self._open = [], 0, None

    def call(self, layer: Layer, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Run a layer's call while the model is traced, or reuse one that was traced before."""
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
        """Return a call's result, and update its caches, according to a traced call."""
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
        MARK(True, call.number, [*tensors, *inside])
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
                not snapshot.changed() and has_same_items(buffers_of(module), buffers)
                for module, snapshot, buffers in before
            ]
            call.reusable = same and all(unchanged) and not more and len(call.parts) == len(written)
            call.reusable &= number is not None or not call.slots
        except _UntoldError:
            outputs.clear()
        call.created = [(t.dtype, t.device, tuple(t.shape), t.stride()) for t in outputs]
        MARK(False, call.number, outputs)
        return result

    def read(self, place: Place, value: Any) -> Any:
        """Record that an integer of a layer is read, and return the value that the reader gets."""
        call = self._open
        if call is None or not call.caches or type(value) is not int:
            if call is not None:
                call.read.add(place)
            return value
        return LayerNumber(value, lambda: call.read.add(place), lambda: call.slots.add(place))


_TRACING: list[Repeats] = []


def _again(call: int, layer: int, inputs: list[Tensor]) -> list[Tensor]:
    types = _TRACING[-1].calls[call].created
    return [torch.empty_strided(size, stride, dtype=dtype, device=device) for dtype, device, size, stride in types]


torch.library.register_fake("graftc_capture::mark", lambda begins, call, tensors: None, lib=_LIBRARY)
torch.library.register_fake("graftc_capture::again", _again, lib=_LIBRARY)


@contextmanager
def traced_once(model: nn.Module, inputs: Mapping[str, Tensor] | None = None) -> Iterator[Repeats]:
    """Let the tracer run only one of several alike layers while the block runs; operators represent the others.

    Args:
        model: any module, in its capture state; it is restored afterwards.
        inputs: the model's inputs by name, if tensors of the other layers should be hidden from the tracer; see
            `graftc.compiler.capture.alike.hidden`.
    """
    repeats = Repeats(alike(model), inputs)
    with ExitStack() as stack:
        for layer in repeats.layers:
            stack.enter_context(replaced(vars(layer.module), "forward", _called_through(repeats, layer)))
        for kind, name, descriptor in _descriptors(repeats):
            stack.enter_context(mock.patch.object(kind, name, descriptor, create=True))
        _TRACING.append(repeats)
        stack.callback(_TRACING.pop)
        yield repeats


def _called_through(repeats: Repeats, layer: Layer) -> Callable[..., Any]:
    original = layer.module.forward

    @functools.wraps(original)
    def forward(*args: Any, **kwargs: Any) -> Any:
        return repeats.call(layer, original, args, kwargs)

    return forward


class _Watched:
    """A descriptor for an attribute that is stored on instances; it reports every read."""

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


def _descriptors(repeats: Repeats) -> list[tuple[type, str, _Watched]]:
    """Return descriptors, with their classes and names, that record reads of the integers in which layers differ."""
    paths: dict[int, str] = {}
    watched: set[tuple[type, str]] = set()
    for layer in repeats.layers:
        parts, first = dict(layer.module.named_modules()), layer.group[0].numbers
        paths |= {id(part): path for path, part in parts.items()}
        watched |= {(type(parts[at]), name) for (at, name), n in layer.numbers.items() if n != first[at, name]}

    def read(module: nn.Module, name: str, value: Any) -> Any:
        return repeats.read((paths[id(module)], name), value) if id(module) in paths else value

    return [(kind, name, _Watched(name, read)) for kind, name in watched]


@contextmanager
def numbers_read(model: nn.Module, elements: Sequence[str]) -> Iterator[set[Place]]:
    """Record the integers of a single element's modules that are read while the block runs.

    Reading a layer's index to select its part of a cache (`graftc.passes.core.elements.layer_cache`) does not count.
    If there are several elements, or none, nothing is recorded.
    """
    seen: set[Place] = set()
    parts = dict(model.get_submodule(elements[0]).named_modules()) if len(elements) == 1 else {}
    paths = {id(part): path for path, part in parts.items()}

    def read(module: nn.Module, name: str, value: Any) -> Any:
        place = paths.get(id(module), ""), name
        if id(module) not in paths or type(value) is not int:
            return value
        if name == LAYER_INDEX:
            return LayerNumber(value, lambda: seen.add(place), lambda: None)
        seen.add(place)
        return value

    with ExitStack() as stack:
        for kind, name in {(type(p), name) for p in parts.values() for name, n in vars(p).items() if type(n) is int}:
            if can_be_watched(kind, name):
                stack.enter_context(mock.patch.object(kind, name, _Watched(name, read), create=True))
        yield seen


# --- what a call depends on, and what it returns -----------------------------------------------------------


class _UntoldError(Exception):
    """Raised for a value of a type that cannot be inspected."""


_PLAIN = (bool, int, float, str, type(None), torch.dtype, torch.device)


def _flat(value: Any) -> tuple[list[Any], pytree.TreeSpec]:
    """Return the leaves of nested lists, tuples and dicts, and their structure; other containers are leaves."""
    return pytree.tree_flatten(value, is_leaf=_is_content)


def _is_content(value: Any) -> bool:
    if type(value) is dict:
        return any(type(key) not in _PLAIN for key in value)
    return type(value) not in (list, tuple)


def _told(value: Any, tensors: list[Tensor], caches: list[CrossedCache] | None = None) -> Any:
    """Return a value as data that describes tensors by their types and by which of them are the same object.

    Tensors are appended to ``tensors`` in order, and caches to ``caches`` if it is given.
    """
    contents, structure = _flat(value)
    return [structure, [_told_content(each, tensors, caches) for each in contents]]


def _told_content(value: Any, tensors: list[Tensor], caches: list[CrossedCache] | None) -> list[Any]:
    if type(value) in _PLAIN:
        return [type(value), value]
    if isinstance(value, Tensor):
        at = _index(value, tensors)
        if at is not None:
            return ["known", at]
        _collect(value, tensors)
        sizes = [expression(size) for size in (*value.shape, *value.stride(), value.storage_offset())]
        return ["new", value.dtype, value.device, value.dim(), sizes, value.requires_grad, type(value)]
    if caches is not None and (cache := crossed(value)) is not None:
        known = [each.cache for each in caches]
        if _index(value, known) is None:
            caches.append(cache)
        return ["cache", _index(value, [*known, value]), cache.described]
    raise _UntoldError


def _index(value: Any, among: Iterable[Any]) -> int | None:
    """Return the index of an object among others, by identity; None if it is not among them."""
    return next((index for index, other in enumerate(among) if other is value), None)


def _collect(tensor: Tensor, tensors: list[Tensor]) -> None:
    """Append a tensor to others.

    Raises:
        _UntoldError: if its dtype, sizes and strides do not fully describe it.
    """
    if tensor.layout != torch.strided or tensor.is_conj() or tensor.is_neg():
        raise _UntoldError
    tensors.append(tensor)


def _taken_apart(value: Any, given: list[Tensor], created: list[Tensor], caches: Sequence[CrossedCache]) -> Any:
    """Return a result as data; tensors become indices into ``given`` or ``created``, to which new ones are added."""
    contents, structure = _flat(value)
    return [_reference(each, given, created, caches) for each in contents], structure


def _reference(
    value: Any, given: list[Tensor], created: list[Tensor], caches: Sequence[CrossedCache]
) -> tuple[str, Any]:
    if type(value) in _PLAIN:
        return "plain", value
    for kind, known in (("given", given), ("created", created), ("cache", [each.cache for each in caches])):
        at = _index(value, known)
        if at is not None:
            return kind, at
    if not isinstance(value, Tensor) or value.requires_grad:
        raise _UntoldError
    _collect(value, created)
    return "created", len(created) - 1


def _put_together(data: Any, given: Sequence[Tensor], created: Sequence[Tensor], caches: Sequence[CrossedCache]) -> Any:
    references, structure = data
    known = {"given": given, "created": created, "cache": [each.cache for each in caches]}
    contents = [content if kind == "plain" else known[kind][content] for kind, content in references]
    return pytree.tree_unflatten(contents, structure)


def _state(module: nn.Module) -> Any:
    """Return other state that a forward pass depends on: torch's state, modes of modules, the number of inner hooks.

    The layer's own hooks run in any case.
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
