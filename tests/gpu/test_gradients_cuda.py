"""Masked gradients on a CUDA device."""

from __future__ import annotations

import pytest
import torch

from graftc.passes.core.ops import gradients
from graftc.passes.core.ops.decompositions import DECOMPOSITIONS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

view = torch.ops.graftc.grad_mask.default
masked = torch.ops.graftc.masked_gradient.default
STEP, SEED = torch.tensor([7]), torch.tensor([123_456_789_012_345])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 5), (2, 1500, 700), (1, 5_000_000)])
def test_the_device_makes_no_difference(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Results are bitwise equal, whatever parts are masked at once and whatever the memory layout."""
    assert view in DECOMPOSITIONS
    grad = torch.randn(shape, dtype=dtype)
    expected = masked(grad, STEP, SEED, 0.3)
    on_device = grad.cuda()
    for given in (on_device, on_device.mT.contiguous().mT):
        assert torch.equal(masked(given, STEP.cuda(), SEED.cuda(), 0.3).cpu(), expected)


def test_a_mask_takes_parts_only() -> None:
    """Apart from the result, masking needs memory only for the elements of one part."""
    grad = torch.randn(2**14, 2**14, dtype=torch.bfloat16, device="cuda")
    step, seed = STEP.cuda(), SEED.cuda()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = masked(grad, step, seed, 0.3)
    peak = torch.cuda.max_memory_allocated() - before
    assert peak - result.untyped_storage().nbytes() <= 8 * 4 * gradients._LARGE_PART


def test_a_weight_is_not_copied() -> None:
    weight = torch.randn(64, 64, device="cuda", requires_grad=True)
    masks = view(weight, STEP.cuda(), SEED.cuda(), 0.3)
    assert masks.data_ptr() == weight.data_ptr()
    masks.sum().backward()
    assert weight.grad is not None
    assert torch.equal(weight.grad.cpu(), masked(torch.ones(64, 64), STEP, SEED, 0.3))
