"""Factors in float32 on a base in bfloat16: the final loss, and the memory that a step keeps for the backward pass."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import graftc
from graftc.testing import tiny
from tests.kit.training import adamw
from tests.passes.methods.test_dtype import saved

pytestmark = pytest.mark.gate

STEPS, RATE, LENGTH = 200, 1e-4, 64
SPEC = {
    "method": "lora",
    "rank": 8,
    "target": {"role": ["attn.q", "attn.k", "attn.v", "attn.o", "ffn.up", "ffn.gate", "ffn.down"]},
}


def wide(**changes: Any) -> Any:
    """Return a decoder of two layers whose widths are those of small real ones."""
    return tiny(
        "llama", hidden_size=512, intermediate_size=1408, num_attention_heads=8, num_key_value_heads=8, **changes
    )


def batches() -> list[Tensor]:
    """Return the same texts for every run: walks on numbers, which a small model learns."""
    rng = torch.Generator().manual_seed(0)
    step = torch.randint(1, 4, (STEPS, 8, 1), generator=rng)
    start = torch.randint(0, 100, (STEPS, 8, 1), generator=rng)
    return list((start + step * torch.arange(LENGTH)) % 100)


def trained(base: torch.dtype, kept: str) -> tuple[float, float]:
    """Return the mean loss of the first and of the last 20 steps."""
    compiled = graftc.compile({"adapt": [{**SPEC, "dtype": kept}]}, wide().to(base)).train()
    optimiser = adamw(compiled, lr=RATE)
    losses = []
    for ids in batches():
        loss = compiled(input_ids=ids, labels=ids).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(float(loss))
    return sum(losses[:20]) / 20, sum(losses[-20:]) / 20


def test_training_ends_where_float32_does() -> None:
    start, exact = trained(torch.float32, "float32")
    ends = {kept: trained(torch.bfloat16, kept)[1] for kept in ("float32", "base")}
    print(f"\nfloat32: {start:.4f} to {exact:.4f}; on bfloat16, by the type of factors: {ends}")
    assert exact < 0.98 * start, "nothing is learnt, so nothing is compared"
    assert abs(ends["float32"] - exact) <= 0.02 * exact


def test_what_a_step_keeps() -> None:
    model = wide().to(torch.bfloat16)
    ids = torch.randint(0, 100, (8, LENGTH))
    sizes = {}
    for kept in ("float32", "base"):
        compiled = graftc.compile({"adapt": [{**SPEC, "dtype": kept}]}, copy.deepcopy(model)).train()
        sizes[kept] = saved(compiled, {"input_ids": ids, "labels": ids})
    print(f"\n{sizes}, {sizes['float32'] / sizes['base']:.3f}")
    assert sizes["float32"] <= 1.05 * sizes["base"]
