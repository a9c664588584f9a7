"""The main path on a CUDA device: compile, train, move, checkpoint, fold."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import graftc
from graftc.testing import FAMILIES, largest_difference, outputs_of, perturb, tiny
from graftc.testing.compare import inputs_for

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

SPEC = {"adapt": [{"method": "lora", "target": {"role": ["attn.q", "attn.v", "ffn.down"]}, "rank": 4, "dropout": 0.1}]}
EXPERTS = {"adapt": [{"method": "lora", "target": {"role": ["attn.q", "attn.v", "experts"]}, "rank": 4}]}


def on_cuda(inputs: Any) -> dict[str, torch.Tensor]:
    return {name: value.cuda() for name, value in inputs.items()}


@pytest.mark.parametrize("family", list(FAMILIES))
def test_a_model_compiled_on_the_device_trains_and_folds(family: str) -> None:
    compiled = graftc.compile(EXPERTS if family == "mixtral" else SPEC, tiny(family).cuda())
    inputs = on_cuda(inputs_for(compiled))
    compiled.train()
    outputs = compiled(**inputs, return_dict=False)
    outputs[0].float().pow(2).mean().backward()
    assert all(p.grad is not None and p.grad.is_cuda for p in compiled.parameters() if p.requires_grad)
    perturb(compiled, 0.05)
    compiled.eval()
    merged = compiled.merge()
    assert merged.certificate.passed
    assert largest_difference(outputs_of(merged, inputs), outputs_of(compiled, inputs)) <= 1e-4


@pytest.mark.parametrize("family", list(FAMILIES))
def test_moving_from_the_cpu_keeps_the_function(family: str) -> None:
    compiled = graftc.compile(EXPERTS if family == "mixtral" else SPEC, tiny(family))
    perturb(compiled, 0.05)
    compiled.eval()
    inputs = inputs_for(compiled)
    expected = outputs_of(compiled, inputs)
    compiled.cuda()
    outputs = [value.cpu() for value in outputs_of(compiled, on_cuda(inputs))]
    assert largest_difference(outputs, expected) <= 1e-3


def test_recomputed_masks_are_the_same_on_both_devices() -> None:
    from graftc.passes.core.ops.dropout import dropout_mask

    seed = torch.tensor([987_654_321_987])
    mask = dropout_mask(torch.empty(64, 33), seed, 0.3)
    assert torch.equal(dropout_mask(torch.empty(64, 33, device="cuda"), seed.cuda(), 0.3).cpu(), mask)
