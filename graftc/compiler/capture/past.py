"""The past of a text as inputs of a graph: what a cache of transformers holds, as tensors with names.

A call with a cache is a call with more tensors: keys and values of every layer, ``past_0_key`` and so on, and, of a
decoder that attends to an encoder, ``cross_0_key`` and so on. The graph returns them longer by the new tokens. A cache
object is taken apart before a graph runs and filled again behind it; inside of a capture it is the other way round.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from graftc.passes.core.ir.past_inputs import is_cross, is_past, past_name, past_place
from graftc.specs.errors.arguments import kind_of
from graftc.specs.errors.diagnostics import GraftError, first_line

CACHES = ("cache", "past_key_values")
"""Names that ``forward`` has for a cache: that of today, and that of code that is older."""
_BEGINS = "_graftc_begins"
"""Where a cache that went through a graph keeps the position of its text's first token."""
CACHE, USE_CACHE = "cache", "use_cache"
MASK, POSITIONS = "attention_mask", "position_ids"
ENCODED = "encoder_outputs"
"""What an encoder gave, ``[batch, sequence, width]``, where a call does not run it."""
ENCODER = "encoder_only"
"""The flag of a graph that runs a model's encoder alone."""
PAST = "past"
"""The axis of a cache that counts tokens."""


@dataclass(frozen=True)
class CacheLayout:
    """What the cache of a model holds.

    Attributes:
        heads: by the name of a tensor its element type, its heads and the width of each; in the order of a cache.
        pairs: whether the model has an encoder, so that its cache is of two kinds.
    """

    heads: Mapping[str, tuple[torch.dtype, int, int]]
    pairs: bool


@dataclass(frozen=True)
class Past:
    """The past of a call.

    Attributes:
        cache: the object that the call was given, or a new one; it is filled with what a graph returns.
        tensors: what is in it, ``[batch, heads, length, width]``, by name.
        length: tokens of the text that are in it.
    """

    cache: Any
    tensors: Mapping[str, Tensor]
    length: int

    @property
    def described(self) -> str:
        """What tells it from the past of other calls."""
        return described_past(self.tensors)


def described_past(names: Iterable[str]) -> str:
    """What tells a past with tensors of some names from others."""
    return "cache:past+cross" if any(is_cross(name) for name in names) else "cache:past"


def probe(model: nn.Module, inputs: Mapping[str, Tensor], name: str) -> CacheLayout:
    """What the cache of a model holds: it is called once, and what it returns is looked at.

    Args:
        model: the source model.
        inputs: small ones that it takes.
        name: that it has for a cache.

    Raises:
        GraftError: GC140 where it keeps no cache of keys and values.
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
    for held, tensor in tensors_of(cache).items():
        if tensor.dim() != 4:
            raise _no_cache(model, f"{held} has {tensor.dim()} axes")
        heads[held] = (tensor.dtype, int(tensor.shape[1]), int(tensor.shape[3]))
    if not heads:
        raise _no_cache(model, "it leaves nothing in one")
    return CacheLayout(heads, pairs)


def require_no_cache(present: Mapping[str, Any], hint: str) -> None:
    """Refuse a call with a cache where there is to be none.

    Raises:
        GraftError: GC140.
    """
    if present.get(USE_CACHE):
        raise GraftError("GC140", "the example call has a cache", hint=hint)


def has_encoder(model: nn.Module) -> bool:
    """Whether a model has a decoder that attends to an encoder."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def _no_cache(model: nn.Module, reason: str) -> GraftError:
    return GraftError(
        "GC140",
        f"{type(model).__name__} keeps no cache of keys and values: {reason}",
        hint="call it without a cache: use_cache=False",
    )


def new_cache(pairs: bool) -> Any:
    """An empty cache whose layers keep all tokens: those with a sliding window too, whose mask leaves out the rest."""
    from transformers.cache_utils import DynamicCache, EncoderDecoderCache

    return EncoderDecoderCache(DynamicCache(), DynamicCache()) if pairs else DynamicCache()


def kinds_of(cache: Any) -> dict[str, Any]:
    """The caches of an object by kind."""
    from transformers.cache_utils import EncoderDecoderCache

    if isinstance(cache, EncoderDecoderCache):
        return {"past": cache.self_attention_cache, "cross": cache.cross_attention_cache}
    return {"past": cache}


def tensors_of(cache: Any) -> dict[str, Tensor]:
    """What a cache of transformers holds, ``[batch, heads, length, width]``, by name."""
    found: dict[str, Tensor] = {}
    for kind, own in kinds_of(cache).items():
        for number, layer in enumerate(own.layers):
            for part, tensor in (("key", layer.keys), ("value", layer.values)):
                if isinstance(tensor, Tensor) and tensor.dim() > 1:
                    found[past_name(kind, number, part)] = tensor
    return found


def read_cache(given: Any, layout: CacheLayout, rows: int, device: torch.device, begins: int = 0) -> Past:
    """The past that a call is given.

    Args:
        given: the value of ``cache``; None for a new one.
        layout: what the model's own cache holds.
        rows: of the batch.
        device: of an empty past.
        begins: the position of a text's first token.

    Raises:
        GraftError: GC140 for a cache of another kind, of another model or another batch, one that has dropped keys, and
            one whose text begins elsewhere.
    """
    from transformers.cache_utils import Cache

    if given is None:
        given = new_cache(layout.pairs)
    if not isinstance(given, Cache):
        raise GraftError(
            "GC140", f"the cache is {kind_of(given)}", hint="give a DynamicCache of transformers, or use_cache=True"
        )
    kinds = kinds_of(given)
    if ("cross" in kinds) != layout.pairs:
        wanted = "EncoderDecoderCache" if layout.pairs else "DynamicCache"
        raise GraftError("GC140", f"the cache is {kind_of(given)}; the model keeps a {wanted}", hint=f"use a {wanted}")
    for own in kinds.values():
        require_growing(own)
    held = tensors_of(given)
    length = _length(held)
    require_beginning(given, begins)
    tensors: dict[str, Tensor] = {}
    crossed = any(is_cross(name) for name in held)
    for name, (dtype, heads, width) in layout.heads.items():
        tensor = held.pop(name, None)
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
            raise other_cache(f"{shown}, where the model and this batch have {wanted}")
        tensors[name] = tensor
    if held:
        raise other_cache(f"it has {next(iter(held))} too")
    return Past(given, tensors, length)


def require_beginning(cache: Any, begins: int) -> None:
    """Refuse a cache whose text stands at other positions than that of a call, and have it say where it stands.

    Args:
        cache: of transformers. Of one that no model of ours has filled nothing is known.
        begins: the position of the text's first token.

    Raises:
        GraftError: GC140.
    """
    if hasattr(cache, "_graftc_front"):  # what is in front is a part of it meanwhile
        return
    known = getattr(cache, _BEGINS, begins)
    if known != begins and cache.get_seq_length():
        message = f"the text in the cache begins at position {known}, and that of the call at {begins}"
        hint = "go on with the adaptations that the cache was made with, or begin with a new cache"
        raise GraftError("GC140", message, hint=hint)
    setattr(cache, _BEGINS, begins)


def require_growing(cache: Any) -> None:
    """Refuse a cache that does not hold all tokens of a text.

    Raises:
        GraftError: GC140.
    """
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    for layer in cache.layers:
        held = layer.keys.shape[2] if isinstance(getattr(layer, "keys", None), Tensor) and layer.keys.dim() > 2 else 0
        if isinstance(layer, DynamicSlidingWindowLayer) and layer.cumulative_length != held:
            message = f"the cache has dropped what is behind its window of {layer.sliding_window} tokens"
            raise GraftError("GC140", message, hint="begin with DynamicCache(), without a config: it keeps all tokens")
        if type(layer) is not DynamicLayer and not isinstance(layer, DynamicSlidingWindowLayer):
            message = f"the cache has layers of the kind {type(layer).__name__}"
            raise GraftError("GC140", message, hint="give a DynamicCache, which grows with the text")


def _length(held: Mapping[str, Tensor]) -> int:
    """Tokens of the text in a cache. Sizes stay what they are: of numbers, `torch.compile` makes a graph each."""
    lengths = [tensor.shape[2] for name, tensor in held.items() if not is_cross(name)]
    if any(length != lengths[0] for length in lengths):
        raise other_cache(f"its layers have {min(lengths)} to {max(lengths)} tokens")
    return lengths[0] if lengths else 0


def other_cache(what: str) -> GraftError:
    """The error for a cache that is not of this model or this batch.

    Args:
        what: tells it.
    """
    return GraftError(
        "GC140",
        f"the cache is not of this model, or not of this batch: {what}",
        hint="give the cache that this model returned for the same batch, or leave it out",
    )


def fill_cache(cache: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Put keys and values into a cache, in the place of those that are there; gives the cache.

    Args:
        cache: of transformers.
        tensors: by name; kinds that are missing stay as they are.
    """
    kinds = kinds_of(cache)
    for name, tensor in tensors.items():
        kind, number, part = past_place(name)
        layer = _layer(kinds[kind], number)
        if part == "key":
            _set(layer, tensor)
        else:
            layer.values = tensor
    if "cross" in kinds and any(is_cross(name) for name in tensors):
        cache.is_updated = dict.fromkeys(range(len(kinds["cross"].layers)), True)
    return cache


def _layer(cache: Any, number: int) -> Any:
    from transformers.cache_utils import DynamicLayer

    while len(cache.layers) <= number:
        cache.layers.append(DynamicLayer())  # type: ignore[no-untyped-call]
    return cache.layers[number]


def _set(layer: Any, keys: Tensor) -> None:
    layer.keys, layer.dtype, layer.device, layer.is_initialized = keys, keys.dtype, keys.device, True
    if hasattr(layer, "cumulative_length"):
        layer.cumulative_length = keys.shape[2]


def cache_name(parameters: Iterable[str]) -> str | None:
    """The name that a ``forward`` with some parameters has for a cache; None where it takes none."""
    return next((name for name in CACHES if name in parameters), None)


def assembled(inputs: Mapping[str, Any], parameters: Iterable[str], pairs: bool) -> dict[str, Any]:
    """Inputs of a graph as the model takes them: tensors of a cache are put together to one, and what an encoder gave
    is that encoder's output again.

    Args:
        inputs: by name.
        parameters: names that the model's ``forward`` takes.
        pairs: whether the model has an encoder.
    """
    given = {name: value for name, value in inputs.items() if not is_past(name)}
    past = {name: value for name, value in inputs.items() if is_past(name)}
    if isinstance(encoded := given.get(ENCODED), Tensor):
        from transformers.modeling_outputs import BaseModelOutput

        given[ENCODED] = BaseModelOutput(last_hidden_state=encoded)
    if past and (name := cache_name(parameters)) is not None:
        given[name] = fill_cache(new_cache(pairs), past)
    return given


def taken_apart(outputs: Any) -> Any:
    """Outputs of a model with the tensors of its cache by name in the place of the cache."""
    for field in CACHES:
        if hasattr(outputs, "keys") and field in outputs.keys() and outputs[field] is not None:  # noqa: SIM118
            outputs[field] = tensors_of(outputs[field])
    return outputs


def with_cache(outputs: Any, cache: Any) -> Any:
    """Outputs of a graph, which have tensors by name in the place of a cache, with the cache filled by these."""
    for field in CACHES:
        if field in outputs.keys() and isinstance(outputs[field], Mapping):  # noqa: SIM118
            outputs[field] = fill_cache(cache, outputs[field])
    return outputs
