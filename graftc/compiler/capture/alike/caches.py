"""Track the part of a cache that a layer owns: the keys and values at one index, selected by the layer's number.

A layer is called with the whole cache. Alike layers do the same to their own parts, with different tensors, so one
layer's call can represent another's. While a layer runs, its number is replaced by an object that records how it is
used; selecting the layer's part is the only use in which layers may differ.
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from graftc.compiler.capture.assignments import has_same_items
from graftc.compiler.capture.fixed_cache import traced_layer
from graftc.compiler.capture.past import kinds_of
from graftc.passes.core.elements import layer_cache

_LIBRARY = "transformers.cache_utils"
_CACHES = (_LIBRARY, layer_cache.__name__)
"""The modules whose own code compares and counts layer numbers to find the layers' parts."""
_OPERATORS = """
    index int float bool hash str repr format eq ne lt le gt ge neg pos abs invert trunc round floor ceil
    add sub mul truediv floordiv mod divmod pow and or xor lshift rshift
    radd rsub rmul rtruediv rfloordiv rmod rdivmod rpow rand ror rxor rlshift rrshift
"""


class LayerNumber:
    """An object that replaces a layer's number while the layer is called with a cache.

    Args:
        number: the layer's number.
        on_read: a function that is called when the number is used for anything except selecting a part.
        on_select: a function that is called when the number is used to select a part.
    """

    def __init__(self, number: int, on_read: Callable[[], None], on_select: Callable[[], None]) -> None:
        self.number, self.on_read, self.on_select = number, on_read, on_select


def _operator(name: str) -> Callable[..., Any]:
    plain = getattr(int, name)

    def operate(self: LayerNumber, *others: Any) -> Any:
        if sys._getframe(1).f_globals.get("__name__") not in _CACHES:
            self.on_read()
        return plain(self.number, *(other.number if type(other) is LayerNumber else other for other in others))

    return operate


for _name in _OPERATORS.split():
    setattr(LayerNumber, f"__{_name}__", _operator(f"__{_name}__"))


class _ByLayer:
    """Mixin for a container of per-layer entries; any access other than by a `LayerNumber` calls ``more``."""

    def __init__(self, entries: Any, more: Callable[[], None]) -> None:
        super().__init__(entries)  # type: ignore[call-arg]
        self._more = more

    def __getitem__(self, at: Any) -> Any:
        return super().__getitem__(self._place(at))  # type: ignore[misc]

    def __iter__(self) -> Iterator[Any]:
        self._more()
        entries: Iterator[Any] = super().__iter__()  # type: ignore[misc]
        return entries

    def _place(self, at: Any) -> Any:
        if type(at) is LayerNumber:
            at.on_select()
            return at.number
        self._more()
        return at


class _Parts(_ByLayer, list[Any]):
    """The layers of a cache."""


class _Flags(_ByLayer, dict[Any, Any]):
    """A cache's flags for its layers, by number."""

    def get(self, at: Any, default: Any = None) -> Any:
        """Return the flag of a layer, as `dict.get` does."""
        return super().get(self._place(at), default)

    def __setitem__(self, at: Any, value: Any) -> None:
        super().__setitem__(self._place(at), value)

    def __contains__(self, at: Any) -> bool:
        return super().__contains__(self._place(at))


class CrossedCache:
    """The state of a cache when a layer is called with it.

    Args:
        cache: a cache that `crossed` accepts.

    Attributes:
        cache: the cache itself.
        described: the data, apart from their parts, in which two such caches must agree.
    """

    def __init__(self, cache: Any) -> None:
        self.cache = cache
        self._kinds = kinds_of(cache)
        self._layers = {kind: list(own.layers) for kind, own in self._kinds.items()}
        self._attributes = {kind: [dict(vars(layer)) for layer in layers] for kind, layers in self._layers.items()}
        self._own = {kind: _without_layers(own) for kind, own in self._kinds.items()}
        self._flags = dict(getattr(cache, "is_updated", {}))
        self.described = type(cache), tuple(self._kinds)

    @property
    def tensors(self) -> list[Tensor]:
        """All tensors that were in the cache."""
        values = (value for layers in self._attributes.values() for layer in layers for value in layer.values())
        return [value for value in values if isinstance(value, Tensor)]

    def part(self, number: int) -> dict[str, Any]:
        """Return a layer's recorded part: the attributes of its cache layer by kind, and the cache's flag."""
        layers = self._attributes.items()
        parts: dict[str, Any] = {kind: dict(own[number]) if number < len(own) else None for kind, own in layers}
        return {**parts, "known": self._flags.get(number)}

    def written(self, number: int | None) -> dict[str, Any] | None:
        """Return a layer's current part; None if the rest of the cache has changed or the part was empty before.

        Initialising an empty part creates constants, of which every layer has its own.

        Args:
            number: the layer's number; None if the layer has not selected a part.
        """
        after = CrossedCache(self.cache)
        for kind, before in self._layers.items():
            now, most = after._layers[kind], len(before) + (number == len(before))
            same = len(before) <= len(now) <= most and all(map(operator.is_, before, now))
            pairs = enumerate(zip(self._attributes[kind], after._attributes[kind], strict=False))
            others = all(has_same_items(*pair) for at, pair in pairs if at != number)
            if not same or not others or self._own[kind] != after._own[kind]:
                return None
        flags = [{at: flag for at, flag in flags.items() if at != number} for flags in (self._flags, after._flags)]
        if not has_same_items(*flags):
            return None
        if number is None:
            return {}
        own, written = self.part(number), after.part(number)
        begun = any(_has_tensors(written[kind]) and not _has_tensors(own[kind]) for kind in self._kinds)
        return None if begun else written

    def put(self, number: int, part: dict[str, Any]) -> None:
        """Replace a layer's part."""
        for kind, own in self._kinds.items():
            if part[kind] is None:
                continue
            while len(own.layers) <= number:
                own.layers.append(own.layer_class_to_replicate())
            attributes = vars(own.layers[number])
            attributes.clear()
            attributes.update(part[kind])
        if part["known"] is not None:
            self.cache.is_updated[number] = part["known"]

    @contextmanager
    def watched(self, more: Callable[[], None]) -> Iterator[None]:
        """Let layer numbers select parts of the cache while the block runs, and call ``more`` on any other access."""
        originals = {kind: own.layers for kind, own in self._kinds.items()}
        flags = vars(self.cache).get("is_updated")
        for own in self._kinds.values():
            own.layers = _Parts(own.layers, more)
        if flags is not None:
            self.cache.is_updated = _Flags(flags, more)
        try:
            yield
        finally:
            for kind, own in self._kinds.items():
                originals[kind][:] = list.__iter__(own.layers)
                own.layers = originals[kind]
            if flags is not None:
                flags.update(dict.items(self.cache.is_updated))
                self.cache.is_updated = flags


def crossed(value: Any) -> CrossedCache | None:
    """Return the state of a cache whose layers keep all tokens and nothing else; None for any other value."""
    if type(value).__module__ != _LIBRARY:
        return None
    from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache

    known = type(value) in (Cache, DynamicCache, EncoderDecoderCache)
    return CrossedCache(value) if known and all(map(_keeps_all, kinds_of(value).values())) else None


def _keeps_all(own: Any) -> bool:
    """Return whether a cache consists of layers that only append tokens, or write them into a fixed length."""
    from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

    if type(own.layers) is not list or own.offloading:
        return False
    kind = {DynamicCache: DynamicLayer, Cache: traced_layer()}.get(type(own))
    usual = own.layer_class_to_replicate in (None, DynamicLayer)
    return usual and all(type(layer) is kind for layer in own.layers)


def _without_layers(own: Any) -> dict[str, Any]:
    return {name: value for name, value in vars(own).items() if name != "layers"}


def _has_tensors(part: dict[str, Any] | None) -> bool:
    return any(isinstance(value, Tensor) for value in (part or {}).values())
