"""A prefix that windows leave visible can be written in PEFT's format for any model without windows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import graftc
from graftc.compiler.roles.windows import may_have_windows
from graftc.specs.errors.diagnostics import GraftError

SIZES = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
NEO = {"vocab_size": 99, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "max_position_embeddings": 64}
GEMMA = {**SIZES, "head_dim": 8}
MODELS: dict[str, tuple[str, dict[str, Any], bool]] = {
    "llama": ("Llama", SIZES, False),
    "gpt2": ("GPT2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}, False),
    "mistral": ("Mistral", {**SIZES, "sliding_window": None}, False),
    "mistral, windows": ("Mistral", {**SIZES, "sliding_window": 4}, True),
    "qwen2": ("Qwen2", SIZES, False),
    "qwen2, one layer of two": ("Qwen2", {**SIZES, "use_sliding_window": True, "max_window_layers": 1}, True),
    "gemma2": ("Gemma2", GEMMA, True),
    "gpt-neo": ("GPTNeo", {**NEO, "attention_types": [[["global"], 2]]}, False),
    "gpt-neo, windows": (
        "GPTNeo",
        {**NEO, "attention_types": [[["global", "local"], 1]], "window_size": 8},
        True,
    ),
}
_MADE: dict[str, nn.Module] = {}


def model(name: str) -> nn.Module:
    if name not in _MADE:
        family, sizes, _ = MODELS[name]
        torch.manual_seed(0)
        config = getattr(transformers, f"{family}Config")(**sizes)
        _MADE[name] = transformers.AutoModelForCausalLM.from_config(config).eval()
    return _MADE[name]


@pytest.mark.parametrize("name", MODELS)
def test_windows_are_told_from_the_model(name: str) -> None:
    assert may_have_windows(model(name)) is MODELS[name][2]


@pytest.mark.slow
def test_a_model_without_a_config_may_have_some() -> None:
    assert may_have_windows(nn.Linear(2, 2))


@pytest.mark.full
@pytest.mark.parametrize("window", [None, "visible", "masked"])
@pytest.mark.parametrize("name", ["llama", "mistral", "mistral, windows"])
def test_a_prefix_in_the_format_of_peft(name: str, window: str | None, tmp_path: Path) -> None:
    entry = {"method": "prefix", "length": 3, "positions": "shifted", **({"window": window} if window else {})}
    compiled = graftc.compile({"adapt": [entry]}, model(name)).eval()
    if MODELS[name][2] and window != "masked":
        with pytest.raises(GraftError, match="window: 'visible' of prefix") as caught:
            compiled.export(tmp_path / "out", format="peft")
        assert caught.value.code == "GC115" and not list(tmp_path.iterdir())
        return
    compiled.export(tmp_path / "out", format="peft")
    again = graftc.import_peft(tmp_path / "out", model(name))
    ids = torch.arange(1, 13)[None]
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids).logits, compiled(input_ids=ids).logits)
