"""Read the cache of keys and values passed to a call."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.nn import functional

from graftc.compiler.capture.isolation import exclusive
from graftc.compiler.capture.past import CACHE, MASK, read_cache
from graftc.compiler.compilation import Compilation
from graftc.compiler.partial_graphs import require_rows_of_one
from graftc.specs.errors.diagnostics import GraftError


def read_past(compilation: Compilation, present: dict[str, Any], begins: int) -> None:
    """Read a call's cache and store it in ``present``.

    Args:
        compilation: the Compilation that runs.
        present: the tensors and flags of the call, by name; modified.
        begins: the position of a text's first token.

    Raises:
        GraftError: GC140 if the model has no cache, the call has no tokens, or the cache belongs to another model;
            GC141 for an adaptation that a cache cannot represent; GC031 for a mask of the wrong length.
    """
    require_rows_of_one(compilation)
    layout = compilation.known_cache_layout
    if layout is None:
        with exclusive():
            layout = compilation.cache_layout
    tokens = tokens_of(compilation, present)
    if tokens is None:
        name = "decoder_input_ids" if layout.pairs else "input_ids"
        raise GraftError("GC140", f"a call with a cache needs {name}", hint=f"pass {name}")
    past = read_cache(present.get(CACHE), layout, tokens, begins)
    present[CACHE] = past
    name = f"decoder_{MASK}" if layout.pairs else MASK
    mask, length = present.get(name), past.length + tokens.shape[1]
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        return
    if past.capacity is not None and length <= mask.shape[1] <= past.capacity:
        present[name] = filled_up(mask, past.capacity)
    elif mask.shape[1] != length:
        hint = f"pass one value for each token, including those in the cache: {[tokens.shape[0], length]}"
        raise GraftError("GC031", f"{name} is {list(mask.shape)}", hint=hint)


def filled_up(mask: Tensor, capacity: int) -> Tensor:
    """Return a mask of tokens, ``[batch, tokens]``, as ``[batch, capacity]``, with zeros for those that are to come."""
    return functional.pad(mask, (0, capacity - mask.shape[1]))


def tokens_of(compilation: Compilation, present: Mapping[str, Any]) -> Tensor | None:
    """Return the tokens with which a call continues a cache (the decoder's if there is an encoder); None if absent."""
    pairs = compilation.cache_layout.pairs
    names = ("decoder_input_ids", "decoder_inputs_embeds") if pairs else ("input_ids", "inputs_embeds")
    return next((present[name] for name in names if name in present), None)
