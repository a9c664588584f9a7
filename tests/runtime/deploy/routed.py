"""Tiny models with feed-forward parts made of experts that a router chooses from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from graftc.testing import tiny

ROLES = ["attn.q", "attn.o", "experts", "router"]


def spec(roles: Sequence[str] = ROLES) -> dict[str, Any]:
    """Return a spec with LoRA on the given roles."""
    return {"adapt": [{"method": "lora", "rank": 4, "target": {"role": list(roles)}}]}


_COMMON: dict[str, Any] = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 101,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "initializer_range": 0.1,
    "eos_token_id": 1,
}
FAMILIES = ("mixtral", "qwen3_moe", "olmoe")


def routed_model(family: str, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """Return a model of a family, with random weights."""
    if family == "mixtral":
        return tiny("mixtral", seed=seed).to(dtype).eval()
    torch.manual_seed(seed)
    return _MAKERS[family]().to(dtype).eval()


def _qwen3_moe() -> nn.Module:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**_COMMON, moe_intermediate_size=40, head_dim=12, norm_topk_prob=True))


def _olmoe() -> nn.Module:
    from transformers import OlmoeConfig, OlmoeForCausalLM

    return OlmoeForCausalLM(OlmoeConfig(**_COMMON, intermediate_size=40))


_MAKERS = {"qwen3_moe": _qwen3_moe, "olmoe": _olmoe}


@torch.no_grad()
def near_twins(model: nn.Module) -> None:
    """Give every three experts the same row of the router, except for the last bit of some of its entries."""
    for name, weight in model.named_parameters():
        if name.endswith("gate.weight"):
            for row in range(len(weight)):
                weight[row] = weight[row - row % 3]
                weight[row, row % 3 :: 3] *= 1 + torch.finfo(weight.dtype).eps
