"""A weight with gated differences: kernels, noise, gradients, decompositions, and what is saved."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from graftc.passes.core.ops import hard_concrete as gated
from graftc.passes.core.ops.decompositions import DECOMPOSITIONS
from graftc.passes.core.ops.hard_concrete import EDGE, noise

op = torch.ops.graftc.gated_weight.default
gradients = torch.ops.graftc.gated_gradients.default
SEED = torch.tensor([123_456_789_014_345])
STRETCH = (-1.5, 1.5)
Arguments = tuple[Tensor, Tensor, Tensor, "Tensor | None"]


def arguments(
    shape: tuple[int, ...] = (7, 9), *, group: bool = True, narrow: torch.dtype | None = None, **options: Any
) -> Arguments:
    """Return ``weight, w, alpha, group``; ``narrow`` is the weight's dtype."""
    generator = torch.Generator().manual_seed(0)
    weight, w, alpha, outer = (
        torch.randn(sizes, generator=generator, dtype=torch.float64).to(options.get("dtype", torch.float64))
        for sizes in (shape, shape, shape, (1,))
    )
    outer = outer.fill_(0.7)  # half open with the noise of SEED
    for tensor in (w, alpha, outer):
        tensor.requires_grad_(options.get("grad", False))
    return weight.to(narrow or weight.dtype), w, alpha, outer if group else None


def plain(weight: Tensor, w: Tensor, alpha: Tensor, group: Tensor | None, seed: Tensor | None) -> Tensor:
    """Compute the formula in plain torch."""

    def gate(logits: Tensor, start: int) -> Tensor:
        if seed is not None:
            logits = logits + noise(logits.numel(), seed, logits.dtype, start).view(logits.shape)
        return torch.clamp(torch.sigmoid(logits) * 3 - 1.5, 0, 1)

    delta = gate(alpha, 0) * w
    return weight + (delta if group is None else delta * gate(group, -1))


@pytest.mark.parametrize("seed", [SEED, None], ids=["drawn", "without noise"])
@pytest.mark.parametrize("group", [True, False], ids=["group", "entries alone"])
def test_it_is_the_formula_and_so_are_its_gradients(seed: Tensor | None, group: bool) -> None:
    """In float64, values and gradients agree with a plain implementation and its autograd, values to 1e-14."""
    own, other = arguments(group=group, grad=True), arguments(group=group, grad=True)
    actual, expected = op(*own, seed, *STRETCH), plain(*other, seed)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-14)
    factor = torch.randn(7, 9, dtype=torch.float64)
    torch.autograd.backward([(actual * factor).sum(), (expected * factor).sum()])
    for a, b in zip(own[1:], other[1:], strict=True):
        if a is not None and b is not None:
            assert a.grad is not None and b.grad is not None
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-12, atol=1e-14)
            assert bool(a.grad.any())


@pytest.mark.slow
@pytest.mark.parametrize("seed", [SEED, None], ids=["drawn", "without noise"])
def test_gradients_are_those_of_small_steps(seed: Tensor | None) -> None:
    weight, *rest = arguments(grad=True)
    weight.requires_grad_()
    assert torch.autograd.gradcheck(lambda *given: op(*given, seed, *STRETCH), (weight, *rest))
    alone = arguments(group=False, grad=True)
    assert torch.autograd.gradcheck(lambda w, alpha: op(alone[0], w, alpha, None, seed, -0.1, 1.1), alone[1:3])


def test_gates_that_are_clipped_have_no_gradient() -> None:
    """A closed gate hides its difference, an open one applies it in full, and neither has a gradient."""
    weight, w, _, _ = arguments((2,), grad=True)
    alpha = torch.tensor([-9.0, 9.0], dtype=torch.float64, requires_grad=True)
    for level, expected in ((9.0, w[1]), (-9.0, w[1] * 0)):
        group = torch.tensor([level], dtype=torch.float64, requires_grad=True)
        actual = op(weight, w, alpha, group, None, *STRETCH)
        assert actual[0] == weight[0] and actual[1] == weight[1] + expected
        for gradient in torch.autograd.grad(actual.sum(), (alpha, group)):
            assert not gradient.any()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["group", "entries alone", "without noise", "16 bits"])
def test_opcheck(kind: str) -> None:
    narrow = torch.bfloat16 if kind == "16 bits" else None
    given = arguments(group=kind != "entries alone", grad=True, dtype=torch.float32, narrow=narrow)
    seed = None if kind == "without noise" else SEED
    torch.library.opcheck(op, (*given, seed, *STRETCH))
    detached = tuple(None if t is None else t.detach() for t in given)
    torch.library.opcheck(gradients, (*detached, seed, *STRETCH))


def test_parts_and_the_decomposition_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Values are bit-identical for every size of parts; the noise of an entry depends on its number."""
    given = arguments((64, 33), dtype=torch.float32)
    whole, whole_gradients = op(*given, SEED, *STRETCH), gradients(*given, SEED, *STRETCH)
    assert torch.equal(DECOMPOSITIONS[op](*given, SEED, *STRETCH), whole)
    monkeypatch.setattr(gated, "_PART", 256)
    assert torch.equal(op(*given, SEED, *STRETCH), whole)
    for a, b in zip(gradients(*given, SEED, *STRETCH), whole_gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_another_layout_of_the_weight_is_the_same() -> None:
    weight, *rest = arguments((8, 6), dtype=torch.float32)
    turned = weight.t().contiguous().t()
    actual = op(turned, *rest, SEED, *STRETCH)
    assert torch.equal(actual, op(weight, *rest, SEED, *STRETCH)) and actual.is_contiguous()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits_are_rounded_once(dtype: torch.dtype) -> None:
    """Gates and the sum are computed in float32, also under autocast; the incoming gradient is in 16 bits."""
    weight, w, alpha, group = arguments(dtype=torch.float32, narrow=dtype, grad=True)
    expected = plain(weight.float(), w, alpha, group, SEED).to(dtype)
    assert torch.equal(op(weight, w, alpha, group, SEED, *STRETCH), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = op(weight, w, alpha, group, SEED, *STRETCH)
    assert torch.equal(actual, expected) and actual.dtype == dtype
    actual.sum().backward()
    assert all(t is not None and t.grad is not None and t.grad.dtype == torch.float32 for t in (w, alpha, group))


def test_parameters_and_the_seed_are_all_that_is_kept() -> None:
    weight, w, alpha, group = arguments((50, 40), grad=True)
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):
        op(weight, w, alpha, group, SEED, *STRETCH)
    assert group is not None
    assert set(saved) == {t.data_ptr() for t in (w, alpha, group, SEED)}


@pytest.mark.parametrize("alpha", [-3.0, -0.5, 0.0, 2.0, 5.0])
@pytest.mark.parametrize("stretch", [STRETCH, (-0.1, 1.1)], ids=str)
def test_gates_are_open_as_often_as_the_penalty_says(alpha: float, stretch: tuple[float, float]) -> None:
    """``P(z > 0) = sigmoid(alpha - log(-low / high))`` holds within five standard deviations of a million coin flips,
    plus the 1e-4 at either end that the noise leaves out. Gates are in [0, 1].
    """
    low, high = stretch
    count = 2**20
    ones = torch.ones(count)
    z = op(torch.zeros(count), ones, torch.full((count,), alpha), None, SEED, low, high)
    assert float(z.min()) >= 0 and float(z.max()) <= 1
    expected = 1 / (1 + math.exp(-(alpha - math.log(-low / high))))
    bound = 5 * math.sqrt(expected * (1 - expected) / count) + EDGE
    assert abs(float((z > 0).double().mean()) - expected) <= bound


@pytest.mark.slow
def test_the_noise_is_uniform_and_its_neighbours_are_strangers() -> None:
    count = 2**20
    u = noise(count, SEED, torch.float64).sigmoid()
    assert EDGE <= float(u.min()) <= 2 * EDGE and 1 - 2 * EDGE <= float(u.max()) <= 1 - EDGE
    shares = torch.histc(u, 64, EDGE, 1 - EDGE) / count
    assert float((shares - 1 / 64).abs().max()) <= 5 * math.sqrt(1 / 64 / count)
    centred = u - 0.5
    for distance in (1, 2, 3, 64, 2**16):
        product = float((centred[:-distance] * centred[distance:]).mean())
        assert abs(product) <= 5 / 12 / math.sqrt(count), distance
    for other in (0, 1, 2**31 + 1, 2**61):
        product = float((centred * (noise(count, torch.tensor([other]), torch.float64).sigmoid() - 0.5)).mean())
        assert abs(product) <= 5 / 12 / math.sqrt(count), other


def test_numbers_beyond_32_bits_have_noise_too() -> None:
    """Entries far into a large table have the same noise in one piece or in many, also where the numbers wrap."""
    for start in (0, 2**31 - 4, 2**31, 2**32 - 4):
        long = noise(8, SEED, torch.float32, start)
        pieces = [noise(1, SEED, torch.float32, start + i) for i in range(8)]
        assert torch.equal(long, torch.cat(pieces)) and long.unique().numel() == 8


def test_its_gradients_have_none() -> None:
    """A second backward pass raises instead of giving wrong numbers."""
    weight, w, alpha, group = arguments(grad=True)
    (grad,) = torch.autograd.grad(op(weight, w, alpha, group, SEED, *STRETCH).square().sum(), alpha, create_graph=True)
    with pytest.raises(RuntimeError, match="gated_gradients"):
        grad.square().sum().backward()
