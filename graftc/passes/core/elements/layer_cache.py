"""A cache of keys and values as one layer sees it: its own tensors go in, and what is new comes out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

Pair = tuple[Tensor, Tensor]
"""Keys and values, ``[batch, heads, tokens, width]``."""


class LayerCache:
    """Stands for the cache of a model in a call of one layer.

    Args:
        layer: the number by which the layer asks.
        past: the keys and values of earlier tokens; None where there are none.

    Attributes:
        new: the keys and values of the call's own tokens, once the layer has given them.
    """

    def __init__(self, layer: int | None, past: Pair | None) -> None:
        self._layer, self._past = layer, past
        self.new: Pair | None = None

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *args: Any, **options: Any) -> Pair:
        """Take the keys and values of the call, and return those of all tokens.

        Raises:
            LookupError: the layer asks for another layer's, or a second time.
        """
        if layer_idx != self._layer or self.new is not None:
            raise LookupError("a layer updates the cache once, at its own number")
        self.new = keys, values
        if self._past is None:
            return keys, values
        return torch.cat([self._past[0], keys], dim=-2), torch.cat([self._past[1], values], dim=-2)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """How many earlier tokens there are."""
        return 0 if self._past is None else self._past[0].shape[-2]

    @property
    def layers(self) -> Mapping[int | None, Any]:
        """The layer's own keys and values, which it reads instead of computing them anew; empty where it has none."""
        return {self._layer: SimpleNamespace(keys=self._past[0], values=self._past[1])} if self._past else {}


def cache_among(args: Iterable[Any], kwargs: Mapping[str, Any]) -> Any:
    """The model's cache among the arguments of a call of a layer; None where there is none."""

    def is_cache(value: Any) -> bool:
        return hasattr(value, "update") and (hasattr(value, "layers") or hasattr(value, "self_attention_cache"))

    return next((value for value in (*args, *kwargs.values()) if is_cache(value)), None)


def describe(cache: Any, module: nn.Module, number: Callable[[Tensor], int]) -> Any:
    """What a cache has for a layer, as plain values; the inverse of `stand_in`.

    Args:
        cache: of the model.
        module: the layer.
        number: gives each tensor a number.

    Raises:
        TypeError: for a layer without one number of its own, and a cache that does more than to put new tokens behind
            earlier ones.
    """
    from transformers.cache_utils import EncoderDecoderCache

    layer = number_of(module)
    if layer is None:
        raise TypeError(type(module).__name__)

    def numbered(part: Any) -> list[int]:
        return [number(tensor) for tensor in _past_in(part, layer) or ()]

    if type(cache) is EncoderDecoderCache:
        updated = bool(cache.is_updated.get(layer))
        cross = numbered(cache.cross_attention_cache)
        return {"own": numbered(cache.self_attention_cache), "cross": cross, "updated": updated}
    return numbered(cache)


def stand_in(module: nn.Module, held: Any, tensors: Sequence[Tensor]) -> Any:
    """What stands for a cache in a call of a layer.

    Args:
        module: the layer.
        held: what `describe` gave.
        tensors: by number.
    """
    layer = number_of(module)

    def own(part: Sequence[int]) -> LayerCache:
        return LayerCache(layer, (tensors[part[0]], tensors[part[1]]) if part else None)

    if isinstance(held, list):
        return own(held)
    from transformers.cache_utils import EncoderDecoderCache

    # Layers ask for the class; its constructor takes nothing but caches of its own library.
    pair = EncoderDecoderCache.__new__(EncoderDecoderCache)
    vars(pair).update(self_attention_cache=own(held["own"]), cross_attention_cache=own(held["cross"]))
    vars(pair)["is_updated"] = {layer: held["updated"]}
    return pair


def news_of(cache: Any) -> Any:
    """The new keys and values of what stands for a cache, behind the call; None where there is no such thing."""
    if isinstance(cache, LayerCache):
        return cache.new
    if isinstance(own := getattr(cache, "self_attention_cache", None), LayerCache):
        return {"own": own.new, "cross": cache.cross_attention_cache.new}
    return None


def write_back(cache: Any, module: nn.Module, news: Any) -> None:
    """Give a model's cache what `news_of` the call found."""
    layer = number_of(module)
    if not isinstance(news, dict):
        if news is not None:
            cache.update(*news, layer)
        return
    write_back(cache.self_attention_cache, module, news["own"])
    write_back(cache.cross_attention_cache, module, news["cross"])
    if news["cross"] is not None:
        cache.is_updated[layer] = True


def number_of(module: nn.Module) -> int | None:
    """The number by which a layer asks for its part of a cache; None where it has none, or several."""
    held = (getattr(each, "layer_idx", None) for each in module.modules())
    numbers = {number for number in held if isinstance(number, int)}
    return numbers.pop() if len(numbers) == 1 else None


def _past_in(cache: Any, layer: int) -> Pair | None:
    """What a cache has of a layer's earlier tokens; None where there are none.

    Raises:
        TypeError: for a cache that does more than to put new tokens behind earlier ones.
    """
    from transformers import cache_utils
    from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

    nothing = getattr(cache_utils, "DummyLayer", None)  # of a layer that reads another's keys and values
    if type(cache) is not DynamicCache or cache.offloading:
        raise TypeError(type(cache).__name__)
    if layer >= len(cache.layers):
        return None
    held: Any = cache.layers[layer]
    if type(held) is nothing:
        return None
    if type(held) not in (DynamicLayer, DynamicSlidingWindowLayer) or getattr(held, "record_past", False):
        raise TypeError(type(held).__name__)
    return (held.keys, held.values) if held.get_seq_length() else None
