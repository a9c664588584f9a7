"""The names of the inputs and outputs of a graph with a cache, as written by Optimum and by transformers' exporters."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Literal, NamedTuple

DECODER = "model.onnx"
"""The file name of a decoder's graph."""
PAIR = ("encoder_model.onnx", "decoder_model.onnx", "decoder_with_past_model.onnx")
"""The file names of an encoder's graph and its decoder's two graphs: for the first step, and for all later steps."""


class Slot(NamedTuple):
    """A cache tensor, ``[batch, heads, length, head_dim]``, of self-attention or of cross-attention."""

    layer: int
    attention: Literal["self", "cross"]
    part: Literal["key", "value"]


# past_key_values.0.key, present.0.decoder.key, present.0.encoder.value
_OPTIMUM = re.compile(r"(?:past_key_values|present)\.(\d{1,4})\.(?:(decoder|encoder)\.)?(key|value)")
# input.cache.layers.0.keys, output.cache.cross_attention_cache.layers.0.values
_TRANSFORMERS = re.compile(
    r"(?:(?:input|output)\.)?(?:cache|past_key_values)\.(?:(self|cross)_attention_cache\.)?layers\.(\d{1,4})\.(key|value)s"
)


def _slot(name: str) -> Slot | None:
    if match := _OPTIMUM.fullmatch(name):
        layer, attention, part = match.groups()
    elif match := _TRANSFORMERS.fullmatch(name):
        attention, layer, part = match.groups()
    else:
        return None
    kind: Literal["self", "cross"] = "cross" if attention in ("encoder", "cross") else "self"
    return Slot(int(layer), kind, "key" if part == "key" else "value")


def slots_of(names: Iterable[str]) -> dict[Slot, str]:
    """Return the names that belong to a cache, by slot, in the order of layers."""
    slots = {slot: name for name in names if (slot := _slot(name)) is not None}
    return dict(sorted(slots.items()))


def optimum_name(slot: Slot, side: Literal["past_key_values", "present"], *, seq2seq: bool = False) -> str:
    """Return the name of a cache tensor as an input (``past_key_values``) or an output (``present``)."""
    middle = {"self": "decoder.", "cross": "encoder."}[slot.attention] if seq2seq else ""
    return f"{side}.{slot.layer}.{middle}{slot.part}"
