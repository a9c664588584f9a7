"""Each method compared with the installed peft: equal tensors give equal outputs, gradients and merged weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import graftc
from graftc.testing.families import tiny
from tests.kit.comparing import every_tensor
from tests.parity.support import MODULES, Case, Names, check, check_float64, globs

FAMILIES = list(MODULES)
LINEAR = [family for family in MODULES if family != "gpt2"]
"""Families without ``Conv1D``, which peft's LoHa and LoKr do not support."""

LORA = Names({"A": "lora_A.default.weight", "B": "lora_B.default.weight"})
IA3 = Names({"l": "ia3_l.default"})
NORMS = Names({part: f"ln_tuning_layers.default.{part}" for part in ("weight", "bias")})
VERA = Names(
    {"d": "vera_lambda_d.default", "b": "vera_lambda_b.default"},
    {part: f"base_model.vera_{part}.default" for part in "AB"},
)
LOHA = Names(
    {f"{ours}{number}": f"hada_w{number}_{theirs}.default" for ours, theirs in ("Ba", "Ab") for number in (1, 2)}
)
LOKR = Names(
    {"C": "lokr_w1.default", "CB": "lokr_w1_a.default", "CA": "lokr_w1_b.default"}
    | {"D": "lokr_w2.default", "DB": "lokr_w2_a.default", "DA": "lokr_w2_b.default"}
)


@pytest.mark.full
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rslora", [False, True], ids=["lora", "rslora"])
def test_lora(family: str, rslora: bool) -> None:
    modules = MODULES[family]
    adaptation = {"method": "lora", "target": globs(modules), "rank": 4, "alpha": 6, "rslora": rslora}
    fields: dict[str, Any] = {"fan_in_fan_out": family == "gpt2", "use_rslora": rslora}
    check(Case(family, adaptation, lambda p: p.LoraConfig(r=4, lora_alpha=6, target_modules=modules, **fields), LORA))


INNER = {
    "bert": r".*\.layer\.\d+\.output\.dense",
    "gpt2": r".*\.mlp\.c_proj",
    "llama": r".*\.down_proj",
    "t5": r".*\.wo",
    "vit": r".*\.fc2",
    "gpt_neox": r".*\.dense_4h_to_h",
}
KEYS_AND_VALUES = {
    "bert": r".*\.(key|value)",
    "gpt2": r".*\.c_attn",
    "llama": r".*\.[kv]_proj",
    "t5": r".*\.[kv]",
    "vit": r".*\.[kv]_proj",
    "gpt_neox": r".*\.query_key_value",
}


@pytest.mark.slow
@pytest.mark.sample("llama")
@pytest.mark.parametrize("family", FAMILIES)
def test_ia3(family: str) -> None:
    """The target is the default one, unless keys and values are rows of a fused matrix. Peft's own default for BERT
    also matches the output of the attention, so the patterns here follow the paper.
    """
    adaptation: dict[str, Any] = {"method": "ia3"}
    if family in ("gpt2", "gpt_neox"):
        adaptation["target"] = globs(MODULES[family])
    targets = f"{KEYS_AND_VALUES[family]}|{INNER[family]}"
    fields = {"target_modules": targets, "feedforward_modules": INNER[family], "fan_in_fan_out": family == "gpt2"}
    check(Case(family, adaptation, lambda p: p.IA3Config(**fields), IA3))


SCALES = {
    "bert": ["LayerNorm"],
    "gpt2": ["ln_1", "ln_2", "ln_f"],
    "llama": ["input_layernorm", "post_attention_layernorm", "norm"],
    "t5": ["layer_norm", "final_layer_norm"],
    "vit": ["layernorm_before", "layernorm_after", "layernorm"],
    "gpt_neox": ["input_layernorm", "post_attention_layernorm", "final_layer_norm"],
}


@pytest.mark.slow
@pytest.mark.sample("bert")
@pytest.mark.parametrize("family", FAMILIES)
def test_norms(family: str) -> None:
    check(
        Case(family, {"method": "norms"}, lambda p: p.LNTuningConfig(target_modules=SCALES[family]), NORMS, noise=0.2)
    )


@pytest.mark.slow
@pytest.mark.sample("bert")
@pytest.mark.parametrize("family", FAMILIES)
def test_vera(family: str) -> None:
    modules = MODULES[family]
    adaptation = {"method": "vera", "target": globs(modules), "rank": 64}
    fields = {"target_modules": modules, "fan_in_fan_out": family == "gpt2"}
    check(Case(family, adaptation, lambda p: p.VeraConfig(r=64, **fields), VERA))


@pytest.mark.slow
def test_vera_draws_the_same_projections() -> None:
    """One seed gives the A and B that peft draws for it, and every tensor starts with peft's values."""
    peft = pytest.importorskip("peft")
    modules = MODULES["llama"]
    adaptation = {"method": "vera", "target": globs(modules), "rank": 24, "projection_seed": 7, "d_initial": 0.3}
    ours = graftc.compile({"adapt": [adaptation]}, tiny("llama")).adapter_state_dict()
    config = peft.VeraConfig(r=24, target_modules=modules, projection_prng_key=7, d_initial=0.3)
    theirs = peft.get_peft_model(tiny("llama"), config)
    peft_tensors = every_tensor(theirs)
    assert {tuple(t.shape) for name, t in ours.items() if name.startswith("graftc.")} == {(24, 80), (48, 24)}
    for name, tensor in ours.items():
        assert torch.equal(tensor, peft_tensors[VERA.of(name)]), name


@pytest.mark.slow
@pytest.mark.sample("bert")
@pytest.mark.parametrize("family", FAMILIES)
def test_lora_in_float64(family: str) -> None:
    modules = MODULES[family]
    adaptation = {"method": "lora", "target": globs(modules), "rank": 4, "alpha": 6}
    fields: dict[str, Any] = {"r": 4, "lora_alpha": 6, "fan_in_fan_out": family == "gpt2", "target_modules": modules}
    check_float64(Case(family, adaptation, lambda p: p.LoraConfig(**fields), LORA))


@pytest.mark.slow
@pytest.mark.sample("bert")
@pytest.mark.parametrize("family", LINEAR)
def test_loha(family: str) -> None:
    modules = MODULES[family]
    adaptation = {"method": "loha", "target": globs(modules), "rank": 4, "alpha": 6}
    config = {"r": 4, "alpha": 6, "target_modules": modules}
    check(Case(family, adaptation, lambda p: p.LoHaConfig(**config), LOHA, noise=0.2))


LOKR_CASES = {
    "default": ({}, {}),
    "full": ({"rank": 12}, {"r": 12}),
    "both": (
        {"decompose_both": True, "factor": 5, "rank": 2},
        {"decompose_both": True, "decompose_factor": 5, "r": 2},
    ),
}


@pytest.mark.full
@pytest.mark.parametrize("family", LINEAR)
@pytest.mark.parametrize("variant", LOKR_CASES)
def test_lokr(family: str, variant: str) -> None:
    """LoKr agrees with D decomposed, nothing decomposed, and both decomposed by a factor that divides neither side."""
    modules, (ours, theirs) = MODULES[family], LOKR_CASES[variant]
    adaptation = {"method": "lokr", "target": globs(modules), "rank": 3, "alpha": 6, **ours}
    config = {"r": 3, "alpha": 6, "target_modules": modules, **theirs}
    check(Case(family, adaptation, lambda p: p.LoKrConfig(**config), LOKR, noise=0.2))
