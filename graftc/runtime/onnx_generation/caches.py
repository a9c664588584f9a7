"""Convert between transformers' ``Cache`` objects and the inputs and outputs of a graph with a cache."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from graftc.runtime.onnx_generation.graphs import OnnxGraph
from graftc.runtime.onnx_generation.io_names import Slot
from graftc.specs.errors.arguments import kind_of
from graftc.specs.errors.diagnostics import GraftError

_HINT = "pass a DynamicCache that this model has filled, or an empty one"


def empty(*, seq2seq: bool) -> Any:
    """Return a new, empty cache of plain layers."""
    from transformers.cache_utils import DynamicCache, EncoderDecoderCache

    return EncoderDecoderCache(DynamicCache(), DynamicCache()) if seq2seq else DynamicCache()


def _parts(cache: Any, *, seq2seq: bool) -> dict[str, Any]:
    """Return the caches, by kind of attention.

    Raises:
        GraftError: GC140 for an object that is not a cache, or a cache for the other kind of model.
    """
    from transformers.cache_utils import Cache, EncoderDecoderCache

    if isinstance(cache, EncoderDecoderCache) and seq2seq:
        return {"self": cache.self_attention_cache, "cross": cache.cross_attention_cache}
    if isinstance(cache, Cache) and not isinstance(cache, EncoderDecoderCache) and not seq2seq:
        return {"self": cache}
    raise GraftError("GC140", f"the cache is {kind_of(cache)}", hint=_HINT)


def cross_is_there(cache: Any) -> bool:
    """Return whether the cache contains the keys and values of the encoder's states."""
    layers = _parts(cache, seq2seq=True)["cross"].layers
    return bool(layers) and bool(layers[0].is_initialized) and layers[0].get_seq_length() > 0


def length_of(cache: Any, *, seq2seq: bool) -> int:
    """Return the number of tokens that the cache contains for each row."""
    return int(_parts(cache, seq2seq=seq2seq)["self"].get_seq_length())


def _plain(layers: list[Any], count: int) -> None:
    """Replace empty cache layers that would drop tokens, so that all layers of a cache hold every token.

    Raises:
        GraftError: GC140 if such a layer is not empty, or if the cache has more non-empty layers than the graph.
    """
    from transformers import cache_utils

    plain: Any = cache_utils.DynamicLayer
    for i, layer in enumerate(layers):
        if type(layer) is plain:
            continue
        if getattr(layer, "is_initialized", True):
            message = f"layer {i} of the cache is a {type(layer).__name__}, but the graph needs every token"
            raise GraftError("GC140", message, hint=_HINT)
        layers[i] = plain()
    surplus = sum(layer.is_initialized for layer in layers[count:])
    if surplus:
        message = f"the cache has {len(layers)} layers with contents, but the graph has {count}: it is another model's"
        raise GraftError("GC140", message, hint=_HINT)
    del layers[count:]
    layers += [plain() for _ in range(count - len(layers))]


def read(graph: OnnxGraph, cache: Any, batch: int, *, seq2seq: bool) -> dict[str, Tensor]:
    """Return a graph's inputs from a cache, by name; an empty cache results in tensors of length 0.

    Raises:
        GraftError: GC140 for a cache that belongs to another model or has another batch size or dtype.
    """
    parts = _parts(cache, seq2seq=seq2seq)
    for attention, part in parts.items():
        count = 1 + max((s.layer for s in graph.present if s.attention == attention), default=-1)
        if attention == "self" or count:
            _plain(part.layers, count)
    lengths: dict[str, int] = {}
    inputs: dict[str, Tensor] = {}
    for slot, name in graph.past.items():
        heads, width = graph.sizes[slot]
        layer = parts[slot.attention].layers[slot.layer]
        tensor = (layer.keys if slot.part == "key" else layer.values) if layer.is_initialized else None
        if tensor is None:
            tensor = torch.empty((batch, heads, 0, width), dtype=graph.dtype(slot), device=graph.device)
        length = lengths.setdefault(slot.attention, tensor.shape[-2])
        _check(slot, tensor, (batch, heads, length, width), graph.dtype(slot))
        inputs[name] = tensor
    return inputs


def _check(slot: Slot, tensor: Tensor, expected: tuple[int, ...], dtype: torch.dtype) -> None:
    if tuple(tensor.shape) != expected or tensor.dtype != dtype:
        has, wants = f"{tensor.dtype} {list(tensor.shape)}", f"{dtype} {list(expected)}"
        message = f"{slot.part}s of layer {slot.layer} in the cache are {has}, but the graph takes {wants}"
        raise GraftError("GC140", message.replace("torch.", ""), hint=_HINT)


def write(graph: OnnxGraph, cache: Any, outputs: Mapping[str, Tensor], *, seq2seq: bool) -> None:
    """Write a graph's outputs into a cache, in place and without copying."""
    parts = _parts(cache, seq2seq=seq2seq)
    for slot, name in graph.present.items():
        layer, tensor = parts[slot.attention].layers[slot.layer], outputs[name]
        if not layer.is_initialized:
            layer.lazy_initialization(tensor, tensor)
        setattr(layer, "keys" if slot.part == "key" else "values", tensor)
        if slot.attention == "cross":
            cache.is_updated[slot.layer] = True
