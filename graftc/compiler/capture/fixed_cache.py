"""Caches of fixed length: tensors of a given size in which each call writes its keys and values behind earlier ones.

transformers calls them static. A graph is captured with layers that return new tensors instead of writing, so that it
has no side effects and every pass applies to it; `passes/lowering/cache_writes.py` lets eval graphs write in place.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from graftc.compat.tensors import version_of
from graftc.passes.core.ir.past_inputs import past_place
from graftc.specs.errors.diagnostics import GraftError

_FIELDS = {"key": "keys", "value": "values"}
"""The attribute of a layer that contains each part of it."""


def is_fixed(cache: Any) -> bool:
    """Return whether a cache consists of layers of fixed length that store all tokens."""
    from transformers.cache_utils import StaticLayer

    return bool(cache.layers) and all(type(layer) is StaticLayer for layer in cache.layers)


def capacity_of(cache: Any) -> int | None:
    """Return the number of tokens for which a cache of fixed length has room; None for any other value."""
    from transformers.cache_utils import Cache

    own: Any = getattr(cache, "self_attention_cache", cache)
    fixed = isinstance(own, Cache) and is_fixed(own)
    layers: Any = own.layers if fixed else ()
    return int(layers[0].max_cache_len) if fixed else None


def fixed_cache(layers: int, length: int) -> Any:
    """Return an empty cache of fixed length.

    Args:
        layers: the number of its layers, all of which store every token, even if they attend only to a window.
        length: the number of tokens for which it has room.
    """
    from transformers.cache_utils import Cache, StaticLayer

    return Cache(layers=[StaticLayer(max_cache_len=length) for _ in range(layers)])


def begin_fixed(cache: Any, heads: Mapping[str, tuple[torch.dtype, int, int]], rows: int, device: torch.device) -> None:
    """Allocate the tensors of layers that have none yet.

    Args:
        cache: the cache.
        heads: the dtype, the number of heads and the head width of each tensor, by name.
        rows: the number of rows of the batch.
        device: the device of the tensors.
    """
    empty: dict[int, dict[str, Tensor]] = {}
    for name, (dtype, count, width) in heads.items():
        kind, number, part = past_place(name)
        if kind == "past" and number < len(cache.layers) and not cache.layers[number].is_initialized:
            empty.setdefault(number, {})[part] = torch.empty((rows, count, 0, width), dtype=dtype, device=device)
    for number, parts in empty.items():
        cache.layers[number].lazy_initialization(parts["key"], parts["value"])


def seen_of(cache: Any) -> Tensor:
    """Return the number of tokens in a cache, ``int64[]``."""
    seen: Tensor = _begun(cache)[0].cumulative_length
    return seen


def _begun(cache: Any) -> list[Any]:
    """Return the layers that have tensors; layers that read the keys and values of others have none."""
    return [layer for layer in cache.layers if layer.is_initialized]


def require_room(cache: Any, tokens: int) -> int:
    """Return the number of tokens in a cache on a CPU, after checking that its layers agree and have room for more.

    Args:
        cache: the cache.
        tokens: the number of tokens of the call.

    Raises:
        GraftError: GC140.
    """
    lengths = {int(layer.cumulative_length) for layer in _begun(cache)}
    if len(lengths) > 1:
        message = f"the cache does not belong to this model: its layers have {min(lengths)} to {max(lengths)} tokens"
        raise GraftError("GC140", message, hint="start with a new cache")
    length, room = max(lengths, default=0), min(layer.max_cache_len for layer in cache.layers)
    if length + tokens > room:
        message = f"the cache has room for {room} tokens, {length} of which it contains, and the call has {tokens}"
        raise GraftError("GC140", message, hint=f"start with StaticCache(config, max_cache_len={length + tokens})")
    return length


def state_of(cache: Any) -> tuple[float, ...]:
    """Return numbers that change whenever anything writes to a cache of fixed length in place."""
    layer = _begun(cache)[0]
    keys, seen = layer.keys, layer.cumulative_length
    if not keys.is_inference() and not seen.is_inference():
        return version_of(keys), version_of(seen)
    length = int(seen)  # inference tensors do not count writes
    return length, *keys[:, :, max(0, length - 1)].flatten().tolist()


def fill_fixed(cache: Any, tensors: Mapping[str, Tensor], tokens: int) -> None:
    """Put the keys and values that a graph returned into a cache of fixed length.

    Args:
        cache: the cache. Its tensors keep their places in memory, unless gradients flow through new ones.
        tensors: keys and values by name; those that the graph has written in place are the cache's own.
        tokens: the number of tokens of the call.
    """
    with_gradients: dict[int, bool] = {}
    for name, tensor in tensors.items():
        _, number, part = past_place(name)
        layer = cache.layers[number]
        own = getattr(layer, _FIELDS[part])
        replaces = own is not tensor and tensor.requires_grad
        if replaces:
            setattr(layer, _FIELDS[part], tensor)
        elif own is not tensor:
            own.copy_(tensor)
        with_gradients[number] = replaces or with_gradients.get(number, False)
    for number, replaced in with_gradients.items():
        layer = cache.layers[number]
        if replaced:  # the backward pass still reads the earlier number
            layer.cumulative_length = layer.cumulative_length + tokens
        else:
            layer.cumulative_length.add_(tokens)


def put_in_front(cache: Any, fronts: Mapping[str, Tensor], length: int) -> None:
    """Move the contents of a cache of fixed length back, and put others in front of them.

    Args:
        cache: the cache, whose tensors are allocated.
        fronts: keys and values for the front, ``[rows, heads, length, width]``, by name.
        length: the number of their tokens, for which the cache has room.
    """
    for name, front in fronts.items():
        _, number, part = past_place(name)
        own = getattr(cache.layers[number], _FIELDS[part])
        own[:, :, length:] = own[:, :, :-length].clone()
        own[:, :, :length] = front
    for layer in _begun(cache):
        layer.cumulative_length.add_(length)


def take_from_front(cache: Any, length: int) -> None:
    """Reverse `put_in_front`."""
    for layer in _begun(cache):
        for own in (layer.keys, layer.values):
            own[:, :, :-length] = own[:, :, length:].clone()
        layer.cumulative_length.sub_(length)


def traced_layers(count: int, seen: Tensor) -> list[Any]:
    """Return fixed-length layers for a trace; their tensors have yet to be filled in.

    Args:
        count: the number of layers.
        seen: the number of tokens that they contain, ``int64[]``.
    """
    return [traced_layer()(seen) for _ in range(count)]


@functools.cache
def traced_layer() -> Any:
    """Return the class of a layer of fixed length whose update returns new tensors, so that it has no side effects."""
    from transformers.cache_utils import CacheLayerMixin, StaticLayer

    class TracedLayer(StaticLayer):
        """A layer of fixed length whose tensors are values of a trace."""

        keys: Tensor
        values: Tensor

        def __init__(self, seen: Tensor) -> None:
            CacheLayerMixin.__init__(self)  # type: ignore[no-untyped-call]
            self.cumulative_length = seen

        @property
        def max_cache_len(self) -> Any:  # type: ignore[override]
            """The number of tokens for which the layer has room."""
            return self.keys.shape[2]

        def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            """Return all keys and values, with the given ones behind those that the layer contains."""
            count = key_states.shape[-2]
            places = torch.arange(count, device=key_states.device) + self.cumulative_length
            self.keys = self.keys.index_copy(2, places, key_states)
            self.values = self.values.index_copy(2, places, value_states)
            self.cumulative_length = self.cumulative_length + count
            return self.keys, self.values

    return TracedLayer
