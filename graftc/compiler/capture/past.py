"""Convert between a transformers cache and a text's past: the cache's contents as named inputs of a graph.

A call with a cache is a call with additional tensors: the keys and values of every layer, named ``past_0_key`` and so
on, and, for a decoder that attends to an encoder, ``cross_0_key`` and so on. The graph returns them extended by the new
tokens. A cache object is taken apart before a graph runs and filled again afterwards; during a capture, it is the other
way round.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from graftc.compat.caches import CACHES, cache_name
from graftc.compiler.capture.fixed_cache import (
    begin_fixed,
    fill_fixed,
    fixed_cache,
    is_fixed,
    require_room,
    seen_of,
    traced_layers,
)
from graftc.compiler.capture.isolation import is_traced
from graftc.passes.core.ir.past_inputs import SEEN, is_cross, is_past, past_name, past_place
from graftc.specs.errors.arguments import kind_of
from graftc.specs.errors.diagnostics import GraftError, first_line

_BEGINS = "_graftc_begins"
"""Attribute of a cache that has passed through a graph: the position of its text's first token."""
CACHE, USE_CACHE = "cache", "use_cache"
MASK, POSITIONS = "attention_mask", "position_ids"
ENCODED = "encoder_outputs"
"""The input for an encoder's output, ``[batch, sequence, width]``, in calls that do not run the encoder."""
ENCODER = "encoder_only"
"""The flag of a graph that runs only a model's encoder."""
PAST = "past"
"""The name of a cache's token axis."""
CAPACITY = "capacity"
"""The name of that axis in a cache of fixed length."""


@dataclass(frozen=True)
class CacheLayout:
    """The contents of a model's cache.

    Attributes:
        heads: the dtype, the number of heads and the head width of each tensor, by name, in the order of a cache.
        pairs: whether the model has an encoder, so that its cache has two kinds of entries.
    """

    heads: Mapping[str, tuple[torch.dtype, int, int]]
    pairs: bool


@dataclass(frozen=True)
class Past:
    """The past of a call.

    Attributes:
        cache: the object passed to the call, or a new one; it is filled with the graph's results.
        tensors: its tensors, ``[batch, heads, length, width]``, by name; for a cache of fixed length also `SEEN`.
        length: the number of the text's tokens that are in the cache; 0 if it is not known without a device's answer.
        capacity: the number of tokens for which a cache of fixed length has room; None for one that grows.
    """

    cache: Any
    tensors: Mapping[str, Tensor]
    length: int
    capacity: int | None = None


def described_past(names: Iterable[str]) -> str:
    """Return a description of the kind of past that has tensors with these names."""
    names = set(names)
    kind = "cache:fixed" if SEEN in names else "cache:past"
    return f"{kind}+cross" if any(map(is_cross, names)) else kind


def probe(model: nn.Module, inputs: Mapping[str, Tensor], name: str) -> CacheLayout:
    """Return the layout of a model's cache, determined by calling the model once.

    Args:
        model: the source model.
        inputs: small inputs that the model accepts.
        name: the name of the model's cache parameter.

    Raises:
        GraftError: GC140 if the model keeps no cache of keys and values.
    """
    pairs = has_encoder(model)
    cache = new_cache(pairs)
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        with torch.no_grad(), torch.random.fork_rng(devices=()):
            model(**inputs, **{name: cache, USE_CACHE: True})
    except Exception as error:
        raise _no_cache(model, f"it does not run with one: {first_line(error)}") from error
    finally:
        for module, mode in modes:
            module.training = mode
    heads = {}
    for tensor_name, tensor in tensors_of(cache).items():
        if tensor.dim() != 4:
            raise _no_cache(model, f"{tensor_name} has {tensor.dim()} axes")
        heads[tensor_name] = (tensor.dtype, int(tensor.shape[1]), int(tensor.shape[3]))
    if not heads:
        raise _no_cache(model, "it stores nothing in one")
    return CacheLayout(heads, pairs)


def require_no_cache(present: Mapping[str, Any], hint: str) -> None:
    """Raise if an example call uses a cache.

    Raises:
        GraftError: GC140.
    """
    if present.get(USE_CACHE):
        raise GraftError("GC140", "the example call uses a cache", hint=hint)


def has_encoder(model: nn.Module) -> bool:
    """Return whether a model has a decoder that attends to an encoder."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def _no_cache(model: nn.Module, reason: str) -> GraftError:
    return GraftError(
        "GC140",
        f"{type(model).__name__} keeps no cache of keys and values: {reason}",
        hint="call it without a cache: use_cache=False",
    )


def new_cache(pairs: bool, layout: CacheLayout | None = None, length: int = 0) -> Any:
    """Return an empty cache whose layers keep all tokens.

    Sliding-window layers keep all tokens as well; their mask excludes those outside the window.

    Args:
        pairs: whether the model has an encoder.
        layout: the layout of the model's own cache, for a cache of fixed length.
        length: the number of tokens for which a cache of fixed length has room.
    """
    from transformers.cache_utils import DynamicCache, EncoderDecoderCache

    own = DynamicCache()
    if layout is not None:
        numbers = [past_place(name)[1] for name in layout.heads if not is_cross(name)]
        own = fixed_cache(max(numbers) + 1, length)
    return EncoderDecoderCache(own, DynamicCache()) if pairs else own


def kinds_of(cache: Any) -> dict[str, Any]:
    """Return the caches within a cache object, by kind."""
    from transformers.cache_utils import EncoderDecoderCache

    if isinstance(cache, EncoderDecoderCache):
        return {"past": cache.self_attention_cache, "cross": cache.cross_attention_cache}
    return {"past": cache}


def tensors_of(cache: Any) -> dict[str, Tensor]:
    """Return the tensors of a transformers cache, ``[batch, heads, length, width]``, by name."""
    tensors: dict[str, Tensor] = {}
    for kind, own in kinds_of(cache).items():
        for number, layer in enumerate(own.layers):
            for part, tensor in (("key", layer.keys), ("value", layer.values)):
                if isinstance(tensor, Tensor) and tensor.dim() > 1:
                    tensors[past_name(kind, number, part)] = tensor
    return tensors


def read_cache(given: Any, layout: CacheLayout, text: Tensor, begins: int = 0) -> Past:
    """Return the past for a call.

    Args:
        given: the value of ``cache``; None for a new one.
        layout: the layout of the model's own cache.
        text: the call's token ids or embeddings, ``[batch, sequence, ...]``; an empty past is created on their device.
        begins: the position of the text's first token.

    Raises:
        GraftError: GC140 for a cache of another type, one that belongs to another model or batch, one that has dropped
            keys, and one whose text begins at another position.
    """
    from transformers.cache_utils import Cache

    if given is None:
        given = new_cache(layout.pairs)
    rows, tokens, device = text.shape[0], text.shape[1], text.device
    if not isinstance(given, Cache):
        raise GraftError(
            "GC140", f"the cache is {kind_of(given)}", hint="pass a transformers DynamicCache, or use_cache=True"
        )
    kinds = kinds_of(given)
    if ("cross" in kinds) != layout.pairs:
        wanted = "EncoderDecoderCache" if layout.pairs else "DynamicCache"
        raise GraftError("GC140", f"the cache is {kind_of(given)}; the model uses a {wanted}", hint=f"use a {wanted}")
    fixed, known = is_fixed(kinds["past"]), 0
    for kind, own in kinds.items():
        if not (fixed and kind == "past"):
            require_growing(own)
            continue
        if device.type == "cpu" and not is_traced():
            known = require_room(own, tokens)
        begin_fixed(own, layout.heads, rows, device)
    entries = tensors_of(given)
    length = _length(entries)
    require_beginning(given, begins)
    tensors: dict[str, Tensor] = {}
    crossed = any(is_cross(name) for name in entries)
    for name, (dtype, heads, width) in layout.heads.items():
        tensor = entries.pop(name, None)
        if tensor is None:
            if is_cross(name) and not crossed:
                continue
            if length or is_cross(name):
                raise other_cache(f"it has no {name}")
            tensor = torch.empty((rows, heads, 0, width), dtype=dtype, device=device)
        own_length = tensor.shape[2] if is_cross(name) else length
        if tensor.dtype != dtype or tuple(tensor.shape) != (rows, heads, own_length, width):
            shown = f"{name} is {str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"
            wanted = f"{str(dtype).removeprefix('torch.')}{[rows, heads, own_length, width]}"
            raise other_cache(f"{shown}, but the model and this batch need {wanted}")
        tensors[name] = tensor
    if entries:
        raise other_cache(f"it also has {next(iter(entries))}")
    if not fixed:
        return Past(given, tensors, length)
    return Past(given, {**tensors, SEEN: seen_of(kinds["past"])}, known, length)


def require_beginning(cache: Any, begins: int) -> None:
    """Raise if a cache's text and a call's begin at different positions; otherwise record the position in the cache.

    Args:
        cache: a transformers cache; one that no graftc model has filled has no recorded position to compare.
        begins: the position of the text's first token.

    Raises:
        GraftError: GC140.
    """
    if hasattr(cache, "_graftc_front"):  # the front is part of the cache during such a call
        return
    known = getattr(cache, _BEGINS, begins)
    if known != begins and cache.get_seq_length():
        message = f"the text in the cache begins at position {known}, but the call's text begins at {begins}"
        hint = "continue with the adaptations that the cache was made with, or start with a new cache"
        raise GraftError("GC140", message, hint=hint)
    setattr(cache, _BEGINS, begins)


def require_growing(cache: Any) -> None:
    """Raise unless a cache holds all tokens of a text.

    Raises:
        GraftError: GC140.
    """
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    for layer in cache.layers:
        length = layer.keys.shape[2] if isinstance(getattr(layer, "keys", None), Tensor) and layer.keys.dim() > 2 else 0
        if isinstance(layer, DynamicSlidingWindowLayer) and layer.cumulative_length != length:
            message = f"the cache has dropped the tokens outside its window of {layer.sliding_window} tokens"
            raise GraftError("GC140", message, hint="start with DynamicCache(), without a config: it keeps all tokens")
        if type(layer) is not DynamicLayer and not isinstance(layer, DynamicSlidingWindowLayer):
            message = f"the cache has layers of type {type(layer).__name__}"
            hint = "pass a DynamicCache, which grows with the text, or Cache(layers=[StaticLayer(length), ...])"
            raise GraftError("GC140", message, hint=hint)


def _length(past: Mapping[str, Tensor]) -> int:
    """Return the number of a text's tokens that are in a cache.

    Sizes are not converted to Python integers, since `torch.compile` would create a graph for each value.
    """
    lengths = [tensor.shape[2] for name, tensor in past.items() if not is_cross(name)]
    if any(length != lengths[0] for length in lengths):
        raise other_cache(f"its layers have {min(lengths)} to {max(lengths)} tokens")
    return lengths[0] if lengths else 0


def other_cache(what: str) -> GraftError:
    """Return the error for a cache that does not belong to this model or this batch.

    Args:
        what: how the cache differs.
    """
    return GraftError(
        "GC140",
        f"the cache does not belong to this model or this batch: {what}",
        hint="pass the cache that this model returned for the same batch, or leave it out",
    )


def fill_cache(cache: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Replace the keys and values in a cache, and return the cache.

    Args:
        cache: a transformers cache.
        tensors: keys and values by name; kinds without any stay unchanged.
    """
    from transformers.cache_utils import DynamicSlidingWindowLayer

    kinds = kinds_of(cache)
    for name, tensor in tensors.items():
        kind, number, part = past_place(name)
        layer = _layer(kinds[kind], number)
        if part == "value":
            layer.values = tensor
            continue
        layer.keys, layer.dtype, layer.device, layer.is_initialized = tensor, tensor.dtype, tensor.device, True
        if isinstance(layer, DynamicSlidingWindowLayer):
            layer.cumulative_length = tensor.shape[2]
    if "cross" in kinds and any(is_cross(name) for name in tensors):
        cache.is_updated = dict.fromkeys(range(len(kinds["cross"].layers)), True)
    return cache


def _layer(cache: Any, number: int) -> Any:
    from transformers.cache_utils import DynamicLayer

    while len(cache.layers) <= number:
        cache.layers.append(DynamicLayer())  # type: ignore[no-untyped-call]
    return cache.layers[number]


def assembled(inputs: Mapping[str, Any], parameters: Iterable[str], pairs: bool) -> dict[str, Any]:
    """Return a graph's inputs in the form that the model accepts.

    A cache's tensors are assembled into a cache, and the encoder's hidden state into an encoder output.

    Args:
        inputs: the graph's inputs by name.
        parameters: names of the parameters of the model's ``forward``.
        pairs: whether the model has an encoder.
    """
    given = {name: value for name, value in inputs.items() if not is_past(name)}
    past = {name: value for name, value in inputs.items() if is_past(name)}
    seen = given.pop(SEEN, None)
    if isinstance(encoded := given.get(ENCODED), Tensor):
        from transformers.modeling_outputs import BaseModelOutput

        given[ENCODED] = BaseModelOutput(last_hidden_state=encoded)
    if past and (name := cache_name(parameters)) is not None:
        given[name] = fill_cache(new_cache(pairs) if seen is None else _traced(pairs, past, seen), past)
    return given


def _traced(pairs: bool, past: Mapping[str, Tensor], seen: Tensor) -> Any:
    """Return an unfilled cache of fixed length for a trace."""
    from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache

    count = 1 + max(past_place(name)[1] for name in past if not is_cross(name))
    fixed = Cache(layers=traced_layers(count, seen))
    return EncoderDecoderCache(fixed, DynamicCache()) if pairs else fixed


def taken_apart(outputs: Any) -> Any:
    """Return a model's outputs with the cache replaced by its tensors, by name."""
    for field in CACHES:
        if hasattr(outputs, "keys") and field in outputs.keys() and outputs[field] is not None:  # noqa: SIM118
            outputs[field] = tensors_of(outputs[field])
    return outputs


def with_cache(outputs: Any, past: Past, tokens: int) -> Any:
    """Return a graph's outputs with the named tensors of a cache replaced by the cache, which is filled with them.

    Args:
        outputs: the outputs.
        past: the past of the call.
        tokens: the number of tokens of the call.
    """
    for field in CACHES:
        if field in outputs.keys() and isinstance(outputs[field], Mapping):  # noqa: SIM118
            outputs[field] = _filled(past, outputs[field], tokens)
    return outputs


def _filled(past: Past, tensors: Mapping[str, Tensor], tokens: int) -> Any:
    if past.capacity is None:
        return fill_cache(past.cache, tensors)
    cross = {name: tensor for name, tensor in tensors.items() if is_cross(name)}
    fill_fixed(kinds_of(past.cache)["past"], {n: t for n, t in tensors.items() if n not in cross}, tokens)
    return fill_cache(past.cache, cross)
