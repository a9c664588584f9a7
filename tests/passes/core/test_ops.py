"""The graftc operators: kernels, gradients and decompositions agree."""

from __future__ import annotations

import pytest
import torch

from graftc.passes.core.ops.decompositions import DECOMPOSITIONS
from graftc.passes.core.ops.dropout import dropout_mask

SEED = torch.tensor([123_456_789_012_345])
op = torch.ops.graftc.seeded_dropout.default


def test_opcheck() -> None:
    torch.library.opcheck(op, (torch.randn(3, 5, requires_grad=True), SEED, 0.3))


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.9])
def test_it_drops_the_share_asked_for(p: float) -> None:
    kept = dropout_mask(torch.empty(1000, 301), SEED, p).double()
    # The mean is within five standard deviations of coin flips.
    assert abs(float(kept.mean()) - (1 - p)) <= 5 * (p * (1 - p) / kept.numel()) ** 0.5
    for dim, count in ((0, 1000), (1, 301)):
        spread = float(kept.mean(dim).std())
        assert spread <= 1.3 * (p * (1 - p) / count) ** 0.5


def test_seeds_give_unrelated_masks() -> None:
    like = torch.empty(400, 250)
    a = dropout_mask(like, torch.tensor([1]), 0.5)
    for other in (0, 2, 1 + 2**31, 2**40):
        b = dropout_mask(like, torch.tensor([other]), 0.5)
        assert abs(float((a == b).double().mean()) - 0.5) < 0.01


def test_the_gradient_uses_the_same_mask_and_saves_only_the_seed() -> None:
    x = torch.randn(40, 30, requires_grad=True)
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        y = op(x, SEED, 0.25)
    y.sum().backward()
    assert saved == [1]
    assert x.grad is not None
    assert torch.equal(x.grad == 0, y == 0)
    assert torch.allclose(x.grad[y != 0], torch.tensor(1 / 0.75))


def test_the_decomposition_is_the_kernel() -> None:
    x = torch.randn(7, 9)
    assert torch.equal(DECOMPOSITIONS[op](x, SEED, 0.4), op(x, SEED, 0.4))


def test_autocast_keeps_the_inputs_type() -> None:
    x = torch.randn(4, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert op(x, SEED, 0.5).dtype == torch.float32
        assert op(x.bfloat16(), SEED, 0.5).dtype == torch.bfloat16
