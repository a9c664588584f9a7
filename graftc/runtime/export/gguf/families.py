"""The model types that can be written as GGUF, as data: llama.cpp's names for them, and their layouts.

Tensor names come from the package ``gguf``, layouts from llama.cpp's ``convert_hf_to_gguf.py`` (0b03ada).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from graftc.runtime.interop.layouts.plain import AttentionSizes
from graftc.runtime.interop.layouts.rotary import as_pairs
from graftc.specs.errors.diagnostics import GraftError, nearest


@dataclass(frozen=True)
class Family:
    """A model type.

    Attributes:
        arch: its name in GGUF.
        rotary: whether the rows of queries and keys are stored in rotation pairs.
        transposed: name suffixes of weights that transformers stores as ``[in, out]``.
        rope: whether positions are encoded as rotations.
        fields: for each function of the writer that adds a value to the file, the names of config fields; the first
            field that is present is read.
    """

    arch: str
    rotary: bool = False
    transposed: tuple[str, ...] = ()
    rope: bool = True
    fields: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: _USUAL)


_USUAL: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "add_context_length": ("max_position_embeddings",),
        "add_embedding_length": ("hidden_size",),
        "add_block_count": ("num_hidden_layers",),
        "add_feed_forward_length": ("intermediate_size",),
        "add_head_count": ("num_attention_heads",),
        "add_head_count_kv": ("num_key_value_heads", "num_attention_heads"),
        "add_layer_norm_rms_eps": ("rms_norm_eps",),
        "add_vocab_size": ("vocab_size",),
    }
)

_GPT2 = MappingProxyType(
    {
        "add_context_length": ("n_positions",),
        "add_embedding_length": ("n_embd",),
        "add_block_count": ("n_layer",),
        "add_head_count": ("n_head",),
        "add_layer_norm_eps": ("layer_norm_epsilon",),
        "add_vocab_size": ("vocab_size",),
    }
)

FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        "llama": Family("llama", rotary=True),
        "mistral": Family("llama", rotary=True),
        "qwen2": Family("qwen2"),
        "qwen3": Family("qwen3"),
        "gpt2": Family(
            "gpt2",
            rope=False,
            transposed=("c_attn.weight", "c_proj.weight", "c_fc.weight"),
            fields=_GPT2,
        ),
    }
)
"""All families, by transformers' model type."""


def family_of(config: Any) -> Family:
    """Return a model's family.

    Raises:
        GraftError: GC060 for a model type that is not in the table, or an option that GGUF cannot store.
    """
    kind = str(getattr(config, "model_type", ""))
    family = FAMILIES.get(kind)
    if family is None:
        close = nearest(kind, FAMILIES)
        hint = f"the model types are {', '.join(FAMILIES)}" + (f"; {close[0]} is the nearest" if close else "")
        raise GraftError("GC060", f"models of type {kind!r} cannot be written as GGUF", hint=hint)
    if family.arch == "llama" and getattr(config, "num_local_experts", None):
        raise GraftError("GC060", "experts cannot be written as GGUF", hint="merge into a transformers folder instead")
    rope_factors(config)
    return family


def architecture(gguf: Any, family: Family) -> Any:
    """Return a family's architecture as a constant of the package ``gguf``."""
    return next(key for key, word in gguf.MODEL_ARCH_NAMES.items() if word == family.arch)


def heads_of(config: Any) -> AttentionSizes:
    """Return a model's attention sizes."""
    names = ("num_attention_heads", "num_key_value_heads", "hidden_size", "head_dim")
    return AttentionSizes.of({name: getattr(config, name, None) for name in names}, "the config")


def rope_factors(config: Any) -> Tensor | None:
    """Return the divisors of the rotation frequencies, ``[size / 2]`` float32; None for the default frequencies.

    Raises:
        GraftError: GC060 for a rotation that depends on the length of the text.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    kind = rope.get("rope_type", "default")
    if kind == "default":
        return None
    if kind not in ("llama3", "linear"):
        raise GraftError("GC060", f"a rotation of type {kind!r} cannot be written as GGUF", hint="merge instead")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    size = heads_of(config).size
    usual = 1.0 / float(rope["rope_theta"]) ** (torch.arange(0, size, 2, dtype=torch.float64) / size)
    own = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))[0].double()
    return (usual / own).float()


def stored(family: Family, heads: AttentionSizes | None, name: str, tensor: Tensor) -> Tensor:
    """Return a model's tensor, or rows of one, in GGUF's layout: rotated rows in pairs, weights as ``[out, in]``."""
    if family.rotary and heads is not None and ".q_proj." in name:
        return as_pairs(tensor, heads.queries)
    if family.rotary and heads is not None and ".k_proj." in name:
        return as_pairs(tensor, heads.keys)
    return tensor.T if name.endswith(family.transposed or ("\0",)) else tensor
