"""The memory that a training step keeps on a GPU."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import graftc
from graftc.runtime.activations import offload
from graftc.testing import perturb, tiny
from tests.kit.comparing import gradients_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
LORA: dict[str, Any] = {"adapt": [{"method": "lora", "rank": 2, "target": {"role": ["attn.q", "ffn.up", "ffn.down"]}}]}


def on_cuda(base: Any, **spec: Any) -> Any:
    model = graftc.compile({**LORA, **spec}, copy.deepcopy(base)).to("cuda").train()
    perturb(model)
    return model


def gradients(model: Any) -> tuple[dict[str, torch.Tensor], int]:
    ids = torch.arange(4 * 64, device="cuda").reshape(4, 64) % 101
    model.zero_grad()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    loss = model(input_ids=ids).logits.square().mean()
    torch.cuda.synchronize()
    kept = torch.cuda.memory_allocated() - before
    loss.backward()
    return gradients_of(model), kept


@pytest.mark.parametrize("memory", [{}, {"budget": 0.3}, {"offload": True}, {"budget": 0.3, "offload": True}])
def test_gradients_are_the_same_and_less_is_kept(memory: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offload, "LEAST", 2**10)
    base = tiny("llama").double().train()
    expected, most = gradients(on_cuda(base, optimise={"off": ["recompute"]}))
    model = on_cuda(base, memory=memory)
    for _ in range(2):
        actual, kept = gradients(model)
        assert kept < most
        for name, gradient in expected.items():
            torch.testing.assert_close(actual[name], gradient, rtol=1e-10, atol=1e-14)
