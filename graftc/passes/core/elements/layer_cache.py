"""A model's cache as seen by one layer: it provides the layer's keys, values and states, and collects the new ones."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

LAYER_INDEX = "layer_idx"
"""The attribute with the index of a layer's part of a cache."""
Pair = tuple[Tensor, Tensor]
"""Keys and values, ``[batch, heads, tokens, width]``."""


class LayerCache:
    """A replacement for the model's cache in a call to one layer.

    Args:
        layer: the index with which the layer accesses its part of the cache.
        past: the keys and values of earlier tokens; None if there are no such tokens.
        states: the states of a layer that stores convolution inputs and recurrent states; None for any other layer.
        sliding: whether the cache retains only the most recent tokens.

    Attributes:
        new: the keys and values of the call's own tokens, once the layer has passed them in.
        states: the states as updated by the layer, which may also write to them in place.
    """

    def __init__(self, layer: int | None, past: Pair | None, states: Any = None, sliding: bool = False) -> None:
        self._layer, self._past, self._sliding = layer, past, sliding
        self.new: Pair | None = None
        self.states = states

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *args: Any, **options: Any) -> Pair:
        """Store the keys and values of the call, and return those of all tokens.

        Raises:
            LookupError: if the layer updates another layer's part, or updates its own a second time.
        """
        if layer_idx != self._layer or self.new is not None:
            raise LookupError("a layer may update only its own part of the cache, and only once")
        self.new = keys, values
        if self._past is None:
            return keys, values
        return torch.cat([self._past[0], keys], dim=-2), torch.cat([self._past[1], values], dim=-2)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the number of earlier tokens.

        Raises:
            LookupError: if the layer has states or only the most recent tokens, so that the number is unknown.
        """
        if self.states is not None or self._sliding:
            raise LookupError(
                "a layer asks for the number of earlier tokens, but its cache does not retain all of them"
            )
        return 0 if self._past is None else self._past[0].shape[-2]

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        """Return the convolution inputs left by earlier tokens, or None."""
        states = self._states_of(layer_idx)
        return states.conv_states[state_idx] if states.has_previous_state[state_idx] else None

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        """Return the recurrent state left by earlier tokens, or None."""
        states = self._states_of(layer_idx)
        return states.recurrent_states[state_idx] if states.has_previous_state[state_idx] else None

    def update_conv_state(self, conv_states: Tensor, layer_idx: int, state_idx: int = 0, **options: Any) -> Any:
        """Store a convolution's inputs, and return them appended to those of earlier tokens."""
        return self._states_of(layer_idx).update_conv_state(conv_states, state_idx, **options)

    def update_recurrent_state(
        self, recurrent_states: Tensor, layer_idx: int, state_idx: int = 0, **options: Any
    ) -> Any:
        """Store a new recurrent state, and return it."""
        return self._states_of(layer_idx).update_recurrent_state(recurrent_states, state_idx, **options)

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:
        """Return whether earlier tokens left states."""
        previous = self._states_of(layer_idx).has_previous_state
        return any(previous.values()) if state_idx is None else bool(previous[state_idx])

    def increase_count(self, layer_idx: int, state_idx: int) -> None:
        """Count one more token, for a layer that writes to its states in place."""
        self._states_of(layer_idx).increase_count(state_idx)

    def is_recording_past(self, layer_idx: int) -> bool:
        """Return False: caches that record earlier states are not supported."""
        return False

    def get_recurrent_states_to_keep(self, layer_idx: int) -> int:
        """Return 0: see `is_recording_past`."""
        return 0

    def _states_of(self, layer: int | None) -> Any:
        """Return the layer's states.

        Raises:
            LookupError: if the layer accesses another layer's states, or has no states.
        """
        if layer != self._layer or self.states is None:
            raise LookupError("a layer may read and update only its own states")
        return self.states

    @property
    def layers(self) -> Mapping[int | None, Any]:
        """The layer's own keys and values, which it reads instead of recomputing them; empty if it has none."""
        return {self._layer: SimpleNamespace(keys=self._past[0], values=self._past[1])} if self._past else {}


def cache_among(args: Iterable[Any], kwargs: Mapping[str, Any]) -> Any:
    """Return the model's cache from the arguments of a layer call, or None if they contain no cache."""

    def is_cache(value: Any) -> bool:
        return hasattr(value, "update") and (hasattr(value, "layers") or hasattr(value, "self_attention_cache"))

    return next((value for value in (*args, *kwargs.values()) if is_cache(value)), None)


def describe(cache: Any, module: nn.Module, number: Callable[[Tensor], int]) -> Any:
    """Return a layer's part of a cache as plain values; the inverse of `stand_in`.

    Args:
        cache: the model's cache.
        module: the layer.
        number: a function that assigns a number to each tensor.

    Raises:
        TypeError: for a layer without a unique index, and for a cache that does more than append new tokens to earlier
            ones.
    """
    from transformers.cache_utils import DynamicSlidingWindowLayer, EncoderDecoderCache, LinearAttentionLayer

    layer = number_of(module)
    if layer is None:
        raise TypeError(type(module).__name__)

    def numbered(part: Any) -> Any:
        entry = _layer_in(part, layer)
        past = [number(tensor) for tensor in _past_in(entry) or ()]
        more: dict[str, Any] = {}
        if isinstance(entry, DynamicSlidingWindowLayer):
            more["sliding"] = True
        if isinstance(entry, LinearAttentionLayer):
            more["states"] = [[number(state) for state in states] for states in _states_in(entry)]
            if (count := getattr(entry, _COUNT, None)) is not None:
                more["count"] = number(count)
        return {"past": past, **more} if more else past

    if type(cache) is EncoderDecoderCache:
        updated = bool(cache.is_updated.get(layer))
        cross = numbered(cache.cross_attention_cache)
        return {"own": numbered(cache.self_attention_cache), "cross": cross, "updated": updated}
    return numbered(cache)


def stand_in(module: nn.Module, cache: Any, tensors: Sequence[Tensor]) -> Any:
    """Return the replacement for a cache in a layer call.

    Args:
        module: the layer.
        cache: the description that `describe` returned.
        tensors: the tensors, indexed by their numbers.
    """
    layer = number_of(module)

    def own(part: Any) -> LayerCache:
        entry = part if isinstance(part, dict) else {"past": part}
        past = tuple(tensors[each] for each in entry["past"])
        states = None
        if "states" in entry:
            count = tensors[entry["count"]] if "count" in entry else None
            states = _with_states([[tensors[each] for each in pair] for pair in entry["states"]], count)
        return LayerCache(layer, (past[0], past[1]) if past else None, states, entry.get("sliding", False))

    if isinstance(cache, list) or "past" in cache:
        return own(cache)
    from transformers.cache_utils import EncoderDecoderCache

    # Layers check for this class, but its constructor accepts only transformers' own caches.
    pair = EncoderDecoderCache.__new__(EncoderDecoderCache)
    vars(pair).update(self_attention_cache=own(cache["own"]), cross_attention_cache=own(cache["cross"]))
    vars(pair)["is_updated"] = {layer: cache["updated"]}
    return pair


def news_of(cache: Any) -> Any:
    """Return the new keys, values and states in a cache's replacement after the call, or None if there are none."""
    if isinstance(cache, LayerCache):
        if cache.states is None:
            return cache.new
        return {"new": cache.new, "states": _states_in(cache.states), "count": getattr(cache.states, _COUNT, None)}
    if isinstance(own := getattr(cache, "self_attention_cache", None), LayerCache):
        return {"own": own.new, "cross": cache.cross_attention_cache.new}
    return None


def write_back(cache: Any, module: nn.Module, news: Any) -> None:
    """Write the result of `news_of` for a call into the model's cache."""
    layer = number_of(module)
    if not isinstance(news, dict):
        if news is not None:
            cache.update(*news, layer)
        return
    if "states" in news:
        write_back(cache, module, news["new"])
        _write_states(cache.layers[layer], news["states"])
        if news["count"] is not None:
            getattr(cache.layers[layer], _COUNT).copy_(news["count"])
        return
    write_back(cache.self_attention_cache, module, news["own"])
    write_back(cache.cross_attention_cache, module, news["cross"])
    if news["cross"] is not None:
        cache.is_updated[layer] = True


def number_of(module: nn.Module) -> int | None:
    """Return the index with which a layer accesses its part of a cache, or None if it has no unique index."""
    indices = (vars(each).get(LAYER_INDEX) for each in module.modules())
    numbers = {number for number in indices if isinstance(number, int)}
    return numbers.pop() if len(numbers) == 1 else None


def _layer_in(cache: Any, layer: int) -> Any:
    """Return a layer's part of a cache, or None if the cache has nothing for it.

    Raises:
        TypeError: for a cache that graphs do not support, and for a layer's part that does more than append new tokens
            to earlier ones or replace its states.
    """
    from transformers import cache_utils
    from transformers.cache_utils import DynamicCache

    if type(cache) is not DynamicCache or cache.offloading:
        raise TypeError(type(cache).__name__)
    if layer >= len(cache.layers):
        return None
    entry: Any = cache.layers[layer]
    if type(entry) is getattr(cache_utils, "DummyLayer", None):  # for a layer that reads another's keys and values
        return None
    taken = [getattr(cache_utils, name, None) for name in _TAKEN]
    if type(entry) not in taken or getattr(entry, "record_past", False):
        raise TypeError(type(entry).__name__)
    return entry


_COUNT = "cumulative_length_linear"
"""The attribute in which a layer with states counts the tokens that it has read; older versions lack it."""
_TAKEN = (
    "DynamicLayer",
    "DynamicSlidingWindowLayer",
    "LinearAttentionLayer",
    "LinearAttentionAndFullAttentionLayer",
    "LinearAttentionAndSlidingWindowAttentionLayer",
)
"""Supported transformers classes for one layer of a cache; older versions lack the last two."""


def _past_in(cache: Any) -> Pair | None:
    """Return the cached keys and values of a layer's earlier tokens, or None."""
    if cache is None or not hasattr(cache, "keys"):
        return None
    return (cache.keys, cache.values) if cache.get_seq_length() else None


def _states_in(cache: Any) -> list[list[Tensor]]:
    """Return the tensors that earlier tokens left in each of a layer's states.

    A state has no tensors, only a convolution's inputs, or both those inputs and a recurrent state.
    """
    pairs = [
        (cache.conv_states[number], cache.recurrent_states[number]) if cache.has_previous_state[number] else ()
        for number in range(cache.number_of_states)
    ]
    return [[state for state in pair if state is not None] for pair in pairs]


def _with_states(states: Sequence[Sequence[Tensor]], count: Tensor | None) -> Any:
    """Return a cache layer with copies of the states that `_states_in` returned for another layer.

    Args:
        states: the states.
        count: the number of earlier tokens, ``int64[]``, if the layer counts them.
    """
    from transformers.cache_utils import LinearAttentionLayer

    copied = LinearAttentionLayer(number_of_states=len(states))
    _write_states(copied, states)
    if count is not None:
        vars(copied)[_COUNT] = count.clone()
    return copied


def _write_states(layer: Any, states: Sequence[Sequence[Tensor]]) -> None:
    """Copy states into a cache layer."""
    for number, (conv, *recurrent) in ((number, pair) for number, pair in enumerate(states) if pair):
        if not layer.is_conv_states_initialized[number]:
            layer.lazy_initialization(conv_states=conv, state_idx=number)
        layer.conv_states[number].copy_(conv)
        layer.has_previous_state[number] = True
        for state in recurrent:
            if not layer.is_recurrent_states_initialized[number]:
                layer.lazy_initialization(recurrent_states=state, state_idx=number)
            layer.recurrent_states[number].copy_(state)
