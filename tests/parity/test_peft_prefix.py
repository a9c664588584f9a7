"""Prefix tuning against peft, which hands the prefix to the model's cache, with its tensors copied over."""

from __future__ import annotations

import copy
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache, MistralConfig, MistralForCausalLM

import graftc
from graftc.runtime.compiled import Compiled
from graftc.testing import largest_difference
from tests.families import tiny

LENGTH = 5
TOLERANCE = 1e-5


def mistral() -> nn.Module:
    torch.manual_seed(3)
    config = MistralConfig(
        vocab_size=61,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=None,
        max_position_embeddings=64,
    )
    return MistralForCausalLM(config).eval()


def model_of(family: str) -> Any:
    return mistral() if family == "mistral" else tiny(family).eval()


def sizes(config: Any) -> tuple[int, int, int]:
    """Layers, heads of keys, and their width."""
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    return config.num_hidden_layers, getattr(config, "num_key_value_heads", None) or heads, width


def batch(model: Any) -> dict[str, Tensor]:
    """Tokens with padding at the end of two rows."""
    torch.manual_seed(1)
    ids = torch.randint(5, 50, (3, 9))
    mask = torch.ones_like(ids)
    mask[1, 6:], mask[2, 4:] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def prefixed(model: Any, table: Tensor, **fields: Any) -> Compiled:
    """Our prefix with the values of peft's table, ``[length, layers, 2, key width]`` flattened."""
    layers, heads, width = sizes(model.config)
    compiled = graftc.compile(
        {"adapt": [{"method": "prefix", "length": LENGTH, "positions": "shifted", **fields}]}, model
    )
    split = table.view(LENGTH, layers, 2, heads * width)
    names = sorted(n.rpartition(".")[0] for n in compiled.adapter_state_dict() if n.endswith(".keys"))
    assert len(names) == layers
    compiled.load_adapter_state_dict(
        {f"{name}.{part}": split[:, i, j] for i, name in enumerate(names) for j, part in enumerate(("keys", "values"))}
    )
    return compiled.eval()


@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox", "mistral"])
def test_language_models(family: str) -> None:
    """Learned positions and rotary ones, heads that share keys, and padding."""
    model = model_of(family)
    layers, heads, width = sizes(model.config)
    config = peft.PrefixTuningConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=LENGTH,
        num_layers=layers,
        num_attention_heads=heads,
        token_dim=heads * width,
    )
    theirs: Any = peft.get_peft_model(copy.deepcopy(model), config).eval()
    table = torch.randn(LENGTH, layers * 2 * heads * width)
    with torch.no_grad():
        theirs.prompt_encoder["default"].embedding.weight.copy_(table)
        inputs = batch(model)
        expected = theirs(**inputs).logits
        found = prefixed(model, table)(**inputs).logits
        real = inputs["attention_mask"].bool()
        base = model(**inputs).logits
    assert largest_difference([found[real]], [expected[real]]) <= TOLERANCE
    assert largest_difference([base[real]], [expected[real]]) > 0.1


def test_encoders() -> None:
    """peft's own way is broken for BERT with this transformers, so the model's cache is filled by hand."""
    model: Any = tiny("bert").eval()
    layers, heads, width = sizes(model.config)
    table = torch.randn(LENGTH, layers * 2 * heads * width)
    inputs = batch(model)
    cache = DynamicCache()
    split = table.view(LENGTH, layers, 2, heads, width).permute(1, 2, 3, 0, 4)
    for layer in range(layers):
        cache.update(*(split[layer, side].expand(3, -1, -1, -1).contiguous() for side in (0, 1)), layer)
    mask = torch.cat([torch.ones(3, LENGTH, dtype=torch.int64), inputs["attention_mask"]], 1)
    positions = torch.arange(LENGTH, LENGTH + 9).expand(3, -1)
    with torch.no_grad():
        hidden = model.bert(
            input_ids=inputs["input_ids"], attention_mask=mask, position_ids=positions, past_key_values=cache
        )
        expected = model.classifier(model.dropout(hidden[1]))
        found = prefixed(model, table)(**inputs).logits
    assert largest_difference([found], [expected]) <= TOLERANCE
