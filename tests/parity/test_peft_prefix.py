"""Prefix tuning compared with peft, which puts the prefix into the model's cache, with peft's tensors copied over."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BloomConfig,
    BloomForCausalLM,
    DynamicCache,
    FalconConfig,
    FalconForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MptConfig,
    MptForCausalLM,
)

import graftc
from graftc.runtime.compiled import Compiled
from graftc.testing import largest_difference, randomise
from graftc.testing.families import tiny

LENGTH = 5
TOLERANCE = 1e-5


_SMALL: dict[str, Any] = {"vocab_size": 61, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
_GROUPED: dict[str, Any] = {**_SMALL, "num_key_value_heads": 2, "intermediate_size": 80, "max_position_embeddings": 64}
_PAIR: dict[str, Any] = {"vocab_size": 61, "d_model": 48, "max_position_embeddings": 64} | {
    f"{side}_{name}": size
    for side in ("encoder", "decoder")
    for name, size in (("layers", 2), ("attention_heads", 4), ("ffn_dim", 60))
}


def mistral(window: int | None = None) -> nn.Module:
    return MistralForCausalLM(MistralConfig(**_GROUPED, sliding_window=window))


def gemma2() -> nn.Module:
    """A Gemma 2 with capped scores, which no fused call supports, and a window in every other layer."""
    config = Gemma2Config(**_GROUPED, head_dim=12, sliding_window=4, attn_logit_softcapping=2.0)
    config._attn_implementation = "eager"
    return Gemma2ForCausalLM(config)


def falcon() -> nn.Module:
    return FalconForCausalLM(FalconConfig(**_SMALL, alibi=True, bos_token_id=1, eos_token_id=2))


def bloom() -> nn.Module:
    return BloomForCausalLM(BloomConfig(vocab_size=61, hidden_size=48, n_layer=2, n_head=4))


def mpt() -> nn.Module:
    return MptForCausalLM(MptConfig(vocab_size=61, d_model=48, n_layers=2, n_heads=4))


def bart() -> nn.Module:
    return BartForConditionalGeneration(BartConfig(**_PAIR))


_BUILD: dict[str, Callable[[], nn.Module]] = {
    "mistral": mistral,
    "window": lambda: mistral(4),
    "gemma2": gemma2,
    "falcon": falcon,
    "bloom": bloom,
    "mpt": mpt,
    "bart": bart,
}


def model_of(family: str) -> Any:
    family, _, implementation = family.partition(" ")
    if family not in _BUILD:
        changes: dict[str, Any] = {"attn_implementation": implementation} if implementation else {}
        return tiny(family, **changes)
    torch.manual_seed(3)
    return randomise(_BUILD[family](), seed=3).eval()


def sizes(config: Any) -> tuple[int, int, int]:
    """Return the number of layers, the number of key heads, and their width."""
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    groups = 1 if getattr(config, "multi_query", False) else getattr(config, "num_key_value_heads", None) or heads
    return config.num_hidden_layers, groups, width


def batch(model: Any) -> dict[str, Tensor]:
    """Tokens with padding at the end of two rows."""
    torch.manual_seed(1)
    ids = torch.randint(5, 50, (3, 9))
    mask = torch.ones_like(ids)
    mask[1, 6:], mask[2, 4:] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def prefixed(model: Any, table: Tensor, **fields: Any) -> Compiled:
    """A model with our prefix and the values of peft's table, ``[length, layers, 2, key width]`` flattened."""
    layers, heads, width = sizes(model.config)
    compiled = graftc.compile(
        {"adapt": [{"method": "prefix", "length": LENGTH, "positions": "shifted", **fields}]}, model
    )
    split = table.view(LENGTH, layers, 2, heads * width)
    return filled(compiled, [(split[:, i, 0], split[:, i, 1]) for i in range(layers)])


def filled(compiled: Compiled, layers: list[tuple[Tensor, Tensor]]) -> Compiled:
    """Set the keys and values of every layer, in order, and return the model in eval mode."""
    names = sorted(n.rpartition(".")[0] for n in compiled.adapter_state_dict() if n.endswith(".keys"))
    pairs = zip(names, layers, strict=True)
    compiled.load_adapter_state_dict(
        {f"{name}.{part}": value for name, pair in pairs for part, value in zip(("keys", "values"), pair, strict=True)}
    )
    return compiled.eval()


def of_peft(model: Any, task: str, layers: int, heads: int, width: int) -> Any:
    """Peft's prefix on a copy of a model."""
    config = peft.PrefixTuningConfig(
        task_type=task, num_virtual_tokens=LENGTH, num_layers=layers, num_attention_heads=heads, token_dim=heads * width
    )
    return peft.get_peft_model(copy.deepcopy(model), config).eval()


def in_cache(table: Tensor, layers: int, heads: int, width: int, mask: Tensor) -> tuple[DynamicCache, Tensor]:
    """Return a table as a cache of a model, and a mask that makes it visible."""
    split = table.view(LENGTH, layers, 2, heads, width).permute(1, 2, 3, 0, 4)
    cache = DynamicCache()
    for layer in range(layers):
        keys, values = (split[layer, side].expand(3, -1, -1, -1).contiguous() for side in (0, 1))
        cache.update(keys, values, layer)
    return cache, torch.cat([torch.ones(3, LENGTH, dtype=torch.int64), mask], 1)


@pytest.mark.slow
@pytest.mark.sample("gpt_neox")
@pytest.mark.parametrize(
    "family", ["gpt2", "gpt2 eager", "llama", "llama eager", "gpt_neox", "mistral", "window", "gemma2", "falcon"]
)
def test_language_models(family: str) -> None:
    """Logits agree with learned and rotary positions, ALiBi, shared key heads, windows, capped scores, and padding."""
    model = model_of(family)
    layers, heads, width = sizes(model.config)
    theirs = of_peft(model, "CAUSAL_LM", layers, heads, width)
    table = torch.randn(LENGTH, layers * 2 * heads * width)
    with torch.no_grad():
        theirs.prompt_encoder["default"].embedding.weight.copy_(table)
        inputs = batch(model)
        expected = theirs(**inputs).logits
        actual = prefixed(model, table, window="masked")(**inputs).logits
        real = inputs["attention_mask"].bool()
        base = model(**inputs).logits
    assert largest_difference([actual[real]], [expected[real]]) <= TOLERANCE
    assert largest_difference([base[real]], [expected[real]]) > 0.1


@pytest.mark.slow
@pytest.mark.parametrize("family", ["bert", "bert eager"])
def test_encoders(family: str) -> None:
    """Peft's own way is broken for BERT with this transformers, so the model's cache is filled by hand."""
    model = model_of(family)
    layers, heads, width = sizes(model.config)
    table = torch.randn(LENGTH, layers * 2 * heads * width)
    inputs = batch(model)
    cache, mask = in_cache(table, layers, heads, width, inputs["attention_mask"])
    positions = torch.arange(LENGTH, LENGTH + 9).expand(3, -1)
    with torch.no_grad():
        hidden = model.bert(
            input_ids=inputs["input_ids"], attention_mask=mask, position_ids=positions, past_key_values=cache
        )
        expected = model.classifier(model.dropout(hidden[1]))
        actual = prefixed(model, table)(**inputs).logits
    assert largest_difference([actual], [expected]) <= TOLERANCE


@pytest.mark.full
@pytest.mark.parametrize("family", ["bloom", "mpt"])
def test_written_out(family: str) -> None:
    """Attentions with ALiBi that have no fused call in transformers; peft has no cache of the shape they expect."""
    model: Any = model_of(family)
    layers, heads, width = 2, 4, 12
    table = torch.randn(LENGTH, layers * 2 * heads * width)
    inputs = batch(model)
    cache, mask = in_cache(table, layers, heads, width, inputs["attention_mask"])
    compiled = graftc.compile({"adapt": [{"method": "prefix", "length": LENGTH}]}, model)
    flat = table.view(LENGTH, layers, 2, heads * width)
    filled(compiled, [(flat[:, i, 0], flat[:, i, 1]) for i in range(layers)])
    real = inputs["attention_mask"].bool()
    with torch.no_grad():
        expected = model(input_ids=inputs["input_ids"], attention_mask=mask, past_key_values=cache).logits
        actual = compiled(**inputs).logits
    assert largest_difference([actual[real]], [expected[real]]) <= TOLERANCE


@pytest.mark.slow
@pytest.mark.sample("t5")
@pytest.mark.parametrize("family", ["t5", "t5 eager", "bart"])
def test_pairs(family: str) -> None:
    """Peft has a prefix in the decoder's self-attention only; its table is repeated over four caches per layer, of
    which every other pair is read.
    """
    model: Any = model_of(family)
    layers, heads, width = 2, 4, 12
    theirs = of_peft(model, "SEQ_2_SEQ_LM", layers, heads, width)
    table = torch.randn(LENGTH, layers * 2 * heads * width)
    inputs = batch(model)
    decoder = torch.randint(5, 50, (3, 7))
    only = {"modules": ["**.decoder.**.self_attn" if family == "bart" else "decoder.**.SelfAttention"]}
    spec = {
        "adapt": [{"method": "prefix", "length": LENGTH, "positions": "shifted", "target": {"role": "attn", **only}}]
    }
    compiled = graftc.compile(spec, model)
    rows = table.view(LENGTH, 2 * layers, heads * width)
    places = [4 * i % (2 * layers) for i in range(layers)]
    filled(compiled, [(rows[:, at], rows[:, at + 1]) for at in places])
    with torch.no_grad():
        theirs.prompt_encoder["default"].embedding.weight.copy_(table)
        expected = theirs(**inputs, decoder_input_ids=decoder).logits
        actual = compiled(**inputs, decoder_input_ids=decoder).logits
        base = model(**inputs, decoder_input_ids=decoder).logits
    assert largest_difference([actual], [expected]) <= TOLERANCE
    assert largest_difference([base], [expected]) > 0.1
