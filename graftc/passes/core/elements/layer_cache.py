"""A cache of keys and values as one layer sees it: its own tensors go in, and what is new comes out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class LayerCache:
    """Stands for the cache of a model in a call of one layer. Keys and values are ``[batch, heads, tokens, width]``.

    Args:
        layer: the number by which the layer asks.
        past: the keys and values of earlier tokens; None where there are none.

    Attributes:
        new: the keys and values of the call's own tokens, once the layer has given them.
    """

    def __init__(self, layer: int | None, past: tuple[Tensor, Tensor] | None) -> None:
        self._layer, self._past = layer, past
        self.new: tuple[Tensor, Tensor] | None = None

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *args: Any, **options: Any) -> tuple[Tensor, Tensor]:
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


def number_of(module: nn.Module) -> int | None:
    """The number by which a layer asks for its part of a cache; None where it has none, or several."""
    held = (getattr(each, "layer_idx", None) for each in module.modules())
    numbers = {number for number in held if isinstance(number, int)}
    return numbers.pop() if len(numbers) == 1 else None


def past_in(cache: Any, layer: int) -> tuple[Tensor, Tensor] | None:
    """What a cache has of a layer's earlier tokens; None where there are none.

    Raises:
        TypeError: for a cache that does more than to put new tokens behind earlier ones.
    """
    from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

    if type(cache) is not DynamicCache or cache.offloading:
        raise TypeError(type(cache).__name__)
    if layer >= len(cache.layers):
        return None
    held: Any = cache.layers[layer]
    if type(held) not in (DynamicLayer, DynamicSlidingWindowLayer) or getattr(held, "record_past", False):
        raise TypeError(type(held).__name__)
    return (held.keys, held.values) if held.get_seq_length() else None
