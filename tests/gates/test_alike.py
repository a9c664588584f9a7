"""On every family, layers that are alike are traced once, and the graph equals that of tracing all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from graftc.testing import families
from tests.compiler.taken_over import taken_over, with_past

pytestmark = pytest.mark.gate

_WIDTHS = {"hidden_size": 48, "num_attention_heads": 4, "intermediate_size": 80}
_DECODER = {**_WIDTHS, "num_key_value_heads": 2, "head_dim": 12, "vocab_size": 101}
_T5 = {"d_model": 48, "d_kv": 12, "d_ff": 80, "num_heads": 4, "vocab_size": 101, "decoder_start_token_id": 0}
_IMAGES = {"image_size": 32, "patch_size": 8}
_STATES = {"hidden_size": 48, "state_size": 4, "vocab_size": 101}
_EXPERTS = {"moe_intermediate_size": 20, "num_experts": 4, "num_experts_per_tok": 2}
_LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 12, "v_head_dim": 12}
_ROUTED = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1, "moe_intermediate_size": 20}


def _of(name: str, config: str, **values: Any) -> Callable[[], nn.Module]:
    return lambda: getattr(transformers, name)(getattr(transformers, config)(**values))


CASES: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "bert": (lambda: families.bert(num_hidden_layers=6), 4),
    "gpt2": (lambda: families.gpt2(n_layer=6), 4),
    "gpt_neox": (lambda: families.gpt_neox(num_hidden_layers=6), 4),
    "llama": (lambda: families.llama(num_hidden_layers=6), 4),
    "mixtral": (lambda: families.mixtral(num_hidden_layers=6), 4),
    # Two kinds of layers that alternate, and two in a ratio of five to one, the second of which is too rare.
    "gemma 2": (_of("Gemma2ForCausalLM", "Gemma2Config", **_DECODER, num_hidden_layers=10), 6),
    "gemma 3": (_of("Gemma3ForCausalLM", "Gemma3TextConfig", **_DECODER, num_hidden_layers=14), 10),
    # The first layer contains the relative bias; the second receives it as a tensor of another kind.
    "t5": (_of("T5ForConditionalGeneration", "T5Config", **_T5, num_layers=6), 6),
    "vit": (
        _of("ViTForImageClassification", "ViTConfig", **_WIDTHS, num_hidden_layers=6, image_size=32, patch_size=8),
        4,
    ),
    "mamba": (
        _of("MambaForCausalLM", "MambaConfig", hidden_size=48, num_hidden_layers=6, vocab_size=101, state_size=4),
        3,
    ),
    "qwen 3 moe": (_of("Qwen3MoeForCausalLM", "Qwen3MoeConfig", **_DECODER, **_EXPERTS, num_hidden_layers=6), 4),
    "deepseek 3": (
        _of(
            "DeepseekV3ForCausalLM",
            "DeepseekV3Config",
            **{**_WIDTHS, **_LATENT, **_ROUTED, "num_key_value_heads": 4, "num_hidden_layers": 8, "vocab_size": 101},
        ),
        3,
    ),
    # One layer that is called several times is not several layers.
    "albert": (
        _of("AlbertModel", "AlbertConfig", **_WIDTHS, embedding_size=48, num_hidden_layers=6, vocab_size=101),
        0,
    ),
}


def _model(case: str) -> nn.Module:
    torch.manual_seed(0)
    return CASES[case][0]().requires_grad_(False)


@pytest.mark.parametrize("case", list(CASES))
def test_families(case: str) -> None:
    assert taken_over(_model(case)).alike == CASES[case][1]


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_modes(mode: str) -> None:
    assert taken_over(_model("gpt2"), mode=mode).alike == 4


@pytest.mark.parametrize(
    ("case", "flag", "count"),
    [
        ("bert", "output_hidden_states", 4),
        # Attentions are recorded by hooks inside layers, which have to run for each layer.
        ("bert", "output_attentions", 0),
        ("t5", "output_attentions", 0),
    ],
)
def test_what_is_recorded_within_layers(case: str, flag: str, count: int) -> None:
    model = _model(case)
    model.set_attn_implementation("eager")  # type: ignore[operator]
    assert taken_over(model, flags=((flag, True),)).alike == count


_BART = {
    "d_model": 48,
    "encoder_layers": 6,
    "decoder_layers": 6,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 80,
    "decoder_ffn_dim": 80,
    "vocab_size": 101,
}
WITH_CACHES: dict[str, tuple[Callable[[], nn.Module], int, int]] = {
    "llama": (CASES["llama"][0], 4, 4),
    "gpt2": (CASES["gpt2"][0], 4, 4),
    "gpt_neox": (CASES["gpt_neox"][0], 4, 4),
    "mixtral": (CASES["mixtral"][0], 4, 4),
    "gemma 2": (CASES["gemma 2"][0], 6, 6),
    "opt": (_of("OPTForCausalLM", "OPTConfig", **_WIDTHS, ffn_dim=80, num_hidden_layers=6, vocab_size=101), 4, 4),
    "t5": (CASES["t5"][0], 3, 3),
    "bart": (_of("BartForConditionalGeneration", "BartConfig", **_BART), 4, 4),
}
"""Models, how many layers are taken over with keys and values of an encoder in the cache, and how many without."""


@pytest.mark.parametrize("crosses", [True, False], ids=["with what is known of the encoder", "of the text alone"])
@pytest.mark.parametrize("case", list(WITH_CACHES))
def test_with_a_cache(case: str, crosses: bool) -> None:
    torch.manual_seed(0)
    make, beside_encoder, alone = WITH_CACHES[case]
    model = make().requires_grad_(False)
    axes = with_past(model, crosses=crosses)
    capture = taken_over(model, axes, mode="eval", flags=(("use_cache", True),))
    assert capture.alike == (beside_encoder if crosses else alone)
