"""Operators on skew-symmetric matrices: values, gradients, and decompositions for exports."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from graftc.passes.core.ops.decompositions import DECOMPOSITIONS

skew = torch.ops.graftc.skew.default
inverse = torch.ops.graftc.inverse_beside_one.default


def drawn(*shape: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("size", [2, 5, 8])
def test_skew(size: int) -> None:
    """The entries are above the diagonal row by row, and the rest is the opposite of the transpose."""
    upper = drawn(2, 3, size * (size - 1) // 2)
    matrices = skew(upper, size)
    row, column = torch.triu_indices(size, size, 1)
    assert torch.equal(matrices[..., row, column], upper)
    assert torch.equal(matrices, -matrices.mT)


@pytest.mark.slow
def test_gradients() -> None:
    """Both have the gradients that finite differences give, and torch's checks of operators pass."""
    upper = drawn(2, 6).requires_grad_()
    torch.library.opcheck(skew, (upper, 4))
    torch.library.opcheck(inverse, (skew(upper.detach(), 4).requires_grad_(),))
    assert torch.autograd.gradcheck(lambda u: skew(u, 4), upper)
    assert torch.autograd.gradcheck(lambda u: inverse(skew(u, 4)), upper)
    assert torch.autograd.gradgradcheck(lambda u: inverse(skew(u, 4)), upper)


@pytest.mark.parametrize(("size", "scale"), [(2, 1.0), (8, 1e-8), (16, 1.0), (32, 100.0)])
def test_elimination(size: int, scale: float) -> None:
    """Without exchanging pivots, errors grow with the square of the largest entry, which may be far above 1."""
    q = skew(drawn(3, size * (size - 1) // 2, scale=scale), size)
    one = torch.eye(size, dtype=q.dtype)
    for result in (inverse(q), DECOMPOSITIONS[inverse](q)):
        assert float(((one + q) @ result - one).abs().max()) <= 1e-14 * size * max(1, scale**2)


def test_nothing_is_rotated_at_zero() -> None:
    """The inverse beside zero is the identity bit for bit, in both forms."""
    zero = torch.zeros(2, 5, 5)
    for form in (inverse, DECOMPOSITIONS[inverse]):
        assert torch.equal(form(zero), torch.eye(5).expand(2, 5, 5))
