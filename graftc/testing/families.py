"""Tiny models of the contract families, with random weights.

The hidden width is 48, and 80 in the feed-forward part, so most weights are not square; there are two layers, and a
vocabulary of 101 tokens. Biases and gains are also random, so that omitting one has an effect, and weights are large
enough to make attention non-uniform.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from graftc.compiler.quiet import quiet_quantisers
from graftc.testing.perturbing import randomise

HIDDEN, INTERMEDIATE, VOCABULARY, LABELS = 48, 80, 101, 3
_COMMON: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": INTERMEDIATE,
    "initializer_range": 0.1,
}


def bert(**changes: Any) -> nn.Module:
    """Build BERT with a classification head; ``changes`` go into its config."""
    from transformers import BertConfig, BertForSequenceClassification

    return BertForSequenceClassification(
        BertConfig(**{**_COMMON, "vocab_size": VOCABULARY, "num_labels": LABELS, **changes})
    )


def roberta(**changes: Any) -> nn.Module:
    """Build RoBERTa with a classification head."""
    from transformers import RobertaConfig, RobertaForSequenceClassification

    own = {"vocab_size": VOCABULARY, "num_labels": LABELS, "max_position_embeddings": 64}
    return RobertaForSequenceClassification(RobertaConfig(**{**_COMMON, **own, **changes}))


def gpt2(**changes: Any) -> nn.Module:
    """Build GPT-2 with its language model head: ``Conv1D`` layers, one with q, k and v fused; the head is tied."""
    from transformers import GPT2Config, GPT2LMHeadModel

    own: dict[str, Any] = {
        "n_embd": HIDDEN,
        "n_layer": 2,
        "n_head": 4,
        "n_inner": INTERMEDIATE,
        "vocab_size": VOCABULARY,
    }
    own["initializer_range"] = 0.1
    return GPT2LMHeadModel(GPT2Config(**{**own, "bos_token_id": 0, "eos_token_id": 0, **changes}))


def llama(**changes: Any) -> nn.Module:
    """Build Llama with its language model head: two key-value heads for four query heads, no biases."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**{**_COMMON, "num_key_value_heads": 2, "vocab_size": VOCABULARY, **changes}))


def gpt_neox(**changes: Any) -> nn.Module:
    """Build GPT-NeoX with its language model head.

    Its q, k and v are interleaved in one weight, and attention runs in parallel with the feed-forward part.
    """
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    return GPTNeoXForCausalLM(GPTNeoXConfig(**{**_COMMON, "vocab_size": VOCABULARY, **changes}))


def mixtral(**changes: Any) -> nn.Module:
    """Build Mixtral with its language model head: each feed-forward part has four experts, two active per token."""
    from transformers import MixtralConfig, MixtralForCausalLM

    own = {"num_key_value_heads": 2, "num_local_experts": 4, "vocab_size": VOCABULARY}
    return MixtralForCausalLM(MixtralConfig(**{**_COMMON, **own, **changes}))


def t5(**changes: Any) -> nn.Module:
    """Build T5: an encoder and a decoder with cross-attention, relative positions and a tied head."""
    from transformers import T5Config, T5ForConditionalGeneration

    own: dict[str, Any] = {"d_model": HIDDEN, "d_kv": 12, "d_ff": INTERMEDIATE, "num_layers": 2, "num_heads": 4}
    own |= {"vocab_size": VOCABULARY, "decoder_start_token_id": 0}
    return T5ForConditionalGeneration(T5Config(**{**own, **changes}))


def vit(**changes: Any) -> nn.Module:
    """Build ViT with a classification head, for images of 32 by 32 in patches of 8."""
    from transformers import ViTConfig, ViTForImageClassification

    own = {"image_size": 32, "patch_size": 8, "num_labels": LABELS}
    return ViTForImageClassification(ViTConfig(**{**_COMMON, **own, **changes}))


FAMILIES: Mapping[str, Callable[..., nn.Module]] = MappingProxyType(
    {
        "bert": bert,
        "roberta": roberta,
        "gpt2": gpt2,
        "gpt_neox": gpt_neox,
        "llama": llama,
        "mixtral": mixtral,
        "t5": t5,
        "vit": vit,
    }
)
"""The builder of each family."""


_LAYERS = {"gpt2": "n_layer", "t5": "num_layers"}


def tiny(
    family: str, seed: int = 0, dtype: torch.dtype = torch.float32, layers: int | None = None, **changes: Any
) -> nn.Module:
    """Return a tiny model of a family in eval mode; the same seed gives the same weights.

    Args:
        family: a key of `FAMILIES`.
        seed: seed of its weights.
        dtype: dtype of its weights.
        layers: number of layers; two by default.
        changes: values for its config.

    Raises:
        KeyError: if there is no such family.
    """
    build = FAMILIES[family]
    if layers is not None:
        changes[_LAYERS.get(family, "num_hidden_layers")] = layers
    with torch.random.fork_rng(devices=()), quiet_quantisers():
        torch.manual_seed(seed)
        model = build(**changes)
    return randomise(model, seed=seed).to(dtype).eval()
