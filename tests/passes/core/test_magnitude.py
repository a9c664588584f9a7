"""Row norms and rescaling: kernels, gradients, decompositions, precision."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from graftc.passes.core.ops.decompositions import DECOMPOSITIONS
from graftc.passes.core.ops.magnitude import SMALLEST, norm_of_squares, squares, wide_product

row_norm = torch.ops.graftc.row_norm.default
rescale = torch.ops.graftc.rescale.default


def factors(
    leading: tuple[int, ...] = (), dtype: torch.dtype = torch.float64, grad: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Return a weight of 7 rows and 9 columns, and a pair of factors of rank 3."""
    generator = torch.Generator().manual_seed(0)
    weight, a, b = (
        torch.randn(*leading, *shape, generator=generator, dtype=torch.float64).to(dtype)
        for shape in ((7, 9), (3, 9), (7, 3))
    )
    return weight, a.requires_grad_(grad), b.requires_grad_(grad)


@pytest.mark.parametrize("leading", [(), (4,)])
def test_the_norm_is_that_of_the_matrix(leading: tuple[int, ...]) -> None:
    weight, a, b = factors(leading)
    expected = torch.linalg.vector_norm(weight + 0.7 * b @ a, dim=-1)
    torch.testing.assert_close(row_norm(squares(weight), weight, a, b, 0.7), expected, rtol=1e-14, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_arithmetic_is_float32_or_better(dtype: torch.dtype) -> None:
    """A weight in 16 bits is widened: the norm is that of its own values, to 1e-6."""
    weight, a, b = factors(dtype=dtype)
    expected = torch.linalg.vector_norm(weight.double() + 0.7 * b.double() @ a.double(), dim=-1)
    actual = row_norm(squares(weight), weight, a, b, 0.7)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual.double(), expected, rtol=1e-6, atol=0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(row_norm(squares(weight), weight, a, b, 0.7), actual)


def test_squares_are_exact_in_float64_and_rounded_in_float32() -> None:
    weight, _, _ = factors(dtype=torch.float32)
    parts = squares(weight)
    expected = weight.double().square().sum(-1)
    torch.testing.assert_close(parts.double().sum(0), expected, rtol=1e-14, atol=0)
    assert torch.equal(parts.sum(0), expected.float())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_without_an_update_the_norm_is_the_first_one_to_the_bit(dtype: torch.dtype) -> None:
    weight, a, b = factors(dtype=dtype)
    squared = squares(weight)
    assert torch.equal(row_norm(squared, weight, a, torch.zeros_like(b), 0.7), norm_of_squares(squared))


def test_a_wide_product_goes_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, a, _ = factors((2,), torch.bfloat16)
    whole = wide_product(weight, a.float())
    monkeypatch.setattr("graftc.passes.core.ops.magnitude._BLOCK", 30)
    torch.testing.assert_close(wide_product(weight, a.float()), whole, rtol=1e-6, atol=1e-6)


def cancelling(left: float, dtype: torch.dtype, leading: tuple[int, ...] = ()) -> tuple[Tensor, Tensor, Tensor]:
    """Return factors that leave only the fraction ``left`` of every other row of the weight, in ``dtype``."""
    weight, a, b = factors(leading)
    rest = weight * left
    weight = torch.where(torch.arange(7)[:, None] % 2 == 0, rest - 0.7 * b @ a, weight)
    return weight.to(dtype), a.to(dtype), b.to(dtype)


def exact_norm(weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Compute the norm of the matrix itself, in float64."""
    return torch.linalg.vector_norm(weight.double() + 0.7 * b.double() @ a.double(), dim=-1)


@pytest.mark.parametrize("leading", [(), (2, 3)])
@pytest.mark.parametrize("left", [1e-1, 1e-3, 1e-5])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_rows_that_nearly_vanish_have_the_norm_of_the_matrix(
    dtype: torch.dtype, left: float, leading: tuple[int, ...]
) -> None:
    """Norms and gradients are right even if the terms of the square cancel, which leaves only rounding of the sums."""
    weight, a, b = cancelling(left, dtype, leading)
    a.requires_grad_()
    b.requires_grad_()
    actual = row_norm(squares(weight), weight, a, b, 0.7)
    torch.testing.assert_close(actual.double(), exact_norm(weight, a, b), rtol=1e-6, atol=0)
    grads = torch.autograd.grad(actual.sum(), (a, b))
    wide = [t.detach().double().requires_grad_() for t in (a, b)]
    expected = torch.autograd.grad(exact_norm(weight, *wide).sum(), wide)
    tolerance = 8e-3 if dtype == torch.bfloat16 else 1e-5
    for narrow, exact in zip(grads, expected, strict=True):
        torch.testing.assert_close(narrow.double(), exact, rtol=tolerance, atol=tolerance * float(exact.abs().max()))


def test_the_decomposition_makes_rows_that_cancel() -> None:
    """An export cannot look at values, so every row is computed, in the dtype of the square."""
    weight, a, b = cancelling(1e-3, torch.float32)
    actual = DECOMPOSITIONS[row_norm](squares(weight), weight, a, b, 0.7)
    torch.testing.assert_close(actual.double(), exact_norm(weight, a, b), rtol=1e-3, atol=0)


def test_a_row_of_zeros_has_a_norm_above_zero_and_no_gradient() -> None:
    zeros = torch.zeros(2, 3)
    a = torch.ones(1, 3, requires_grad=True)
    actual = row_norm(squares(zeros), zeros, a, zeros[:, :1], 1.0)
    assert torch.equal(actual, torch.full((2,), SMALLEST**0.5))
    actual.sum().backward()
    assert a.grad is not None and not a.grad.any()


def test_the_gradient_of_the_norm_has_none() -> None:
    """A second backward pass raises instead of giving wrong numbers."""
    weight, a, b = factors(grad=True)
    norm = row_norm(squares(weight), weight, a, b, 0.7)
    (grad,) = torch.autograd.grad(norm.square().sum(), a, create_graph=True)
    with pytest.raises(RuntimeError, match="row_norm_backward"):
        grad.square().sum().backward()


@pytest.mark.parametrize("leading", [(), (4,)])
def test_gradients_of_the_norm(leading: tuple[int, ...]) -> None:
    weight, a, b = factors(leading, grad=True)
    squared = squares(weight)
    assert torch.autograd.gradcheck(lambda x, y: row_norm(squared, weight, x, y, 0.7), (a, b))


def test_gradients_of_the_norm_of_16_bits() -> None:
    """Gradients have the dtype of the factors and are computed in float32."""
    weight, a, b = factors(dtype=torch.bfloat16, grad=True)
    row_norm(squares(weight), weight, a, b, 0.7).sum().backward()
    wide = [t.detach().double().requires_grad_() for t in (a, b)]
    torch.linalg.vector_norm(weight.double() + 0.7 * wide[1] @ wide[0], dim=-1).sum().backward()
    for narrow, exact in zip((a, b), wide, strict=True):
        assert narrow.grad is not None and exact.grad is not None and narrow.grad.dtype == torch.bfloat16
        torch.testing.assert_close(narrow.grad, exact.grad.bfloat16(), rtol=8e-3, atol=1e-5)


CASES: dict[str, dict[str, Any]] = {
    "alone": {},
    "delta": {"delta": (4, 5, 7)},
    "offset": {"delta": (4, 5, 7), "offset": (7,)},
    "lost": {"delta": (4, 5, 7), "lost": (4, 5, 7)},
    "both": {"delta": (4, 5, 7), "offset": (7,), "lost": (4, 5, 7)},
    "each": {"scale": (4, 5, 7), "delta": (4, 5, 7), "offset": (4, 1, 7)},
}


def arguments(case: str, dtype: torch.dtype = torch.float64, grad: bool = True) -> list[Tensor | None]:
    """Return ``x, scale, delta, offset, lost``."""
    generator = torch.Generator().manual_seed(1)
    shapes = {"x": (4, 5, 7), "scale": (7,), **CASES[case]}
    names = ("x", "scale", "delta", "offset", "lost")
    return [
        torch.randn(shapes[n], generator=generator, dtype=torch.float64).to(dtype).requires_grad_(grad)
        if n in shapes
        else None
        for n in names
    ]


@pytest.mark.parametrize("case", CASES)
def test_rescaling(case: str) -> None:
    """The kernel and the decomposition match the formula, and the gradients are right."""
    values = arguments(case)
    x, scale, delta, offset, lost = values
    fixed = sum((t for t in (offset, lost) if t is not None), torch.zeros(()))
    assert x is not None and scale is not None
    expected = scale * x + (0 if delta is None else delta) + (1 - scale) * fixed
    torch.testing.assert_close(rescale(*values, False), expected, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(DECOMPOSITIONS[rescale](*values, False), expected, rtol=1e-14, atol=1e-14)
    present = [t for t in values if t is not None]

    def function(*given: Tensor) -> Tensor:
        rest = iter(given)
        result: Tensor = rescale(*(None if t is None else next(rest) for t in values), False)
        return result

    assert torch.autograd.gradcheck(function, tuple(present))


@pytest.mark.parametrize("strided", [False, True])
def test_rescaling_the_whole_counts_both_places_of_the_scale(strided: bool) -> None:
    """In ``c x + c d``, ``c`` is detached in the second term and its gradient counts both; only the result is saved, in
    the layout of ``x``.
    """
    x, scale, delta, _, _ = arguments("delta")
    assert x is not None and scale is not None and delta is not None
    if strided:
        x = x.detach().movedim(0, -1).contiguous().movedim(-1, 0).requires_grad_()
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        actual = rescale(x, scale, delta * scale.detach(), None, None, True)
    assert actual.stride() == x.stride()
    kept = {t.data_ptr() for t in saved if t.numel() == x.numel()}
    assert kept == {actual.data_ptr()} | ({delta.data_ptr()} & kept)
    grads = torch.autograd.grad(actual.square().sum(), [x, scale, delta])
    whole = scale * (x + delta)
    expected = torch.autograd.grad(whole.square().sum(), [x, scale, delta])
    for a, b in zip(grads, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_a_scale_of_zero_has_a_gradient() -> None:
    x, scale, _, _, _ = arguments("alone")
    assert x is not None and scale is not None
    with torch.no_grad():
        scale[2] = 0
    (grad,) = torch.autograd.grad(rescale(x, scale, None, None, None, True).sum(), scale)
    torch.testing.assert_close(grad, x.detach().sum((0, 1)), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", ["delta", "both"])
def test_a_scale_of_one_changes_no_bit(dtype: torch.dtype, case: str) -> None:
    x, _, delta, offset, lost = arguments(case, dtype, grad=False)
    assert x is not None and delta is not None
    one = torch.ones(7)
    actual = rescale(x, one, torch.zeros_like(delta), offset, lost, case == "delta")
    assert actual.dtype == dtype
    assert torch.equal(actual, x)


def test_16_bits_are_rescaled_in_float32() -> None:
    """The scale is not rounded to 16 bits, and sums over tokens are in float32."""
    x, _, _, _, _ = arguments("alone", torch.bfloat16)
    assert x is not None
    scale = torch.full((7,), 1.001, requires_grad=True)
    actual = rescale(x, scale, None, None, None, False)
    assert torch.equal(actual, (x.float() * 1.001).bfloat16())
    actual.sum().backward()
    assert scale.grad is not None and scale.grad.dtype == torch.float32
    torch.testing.assert_close(scale.grad, x.detach().float().sum((0, 1)), rtol=1e-2, atol=1e-2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(rescale(x, scale, None, None, None, False), actual)


@pytest.mark.full
def test_opcheck() -> None:
    weight, a, b = factors(grad=True)
    torch.library.opcheck(row_norm, (squares(weight), weight, a, b, 0.7))
    for case in CASES:
        torch.library.opcheck(rescale, (*arguments(case), False))
    torch.library.opcheck(rescale, (*arguments("delta"), True))


def test_the_decomposition_of_the_norm_is_the_kernel() -> None:
    weight, a, b = factors((2,), torch.bfloat16)
    given = (squares(weight), weight, a, b, 0.7)
    assert torch.equal(DECOMPOSITIONS[row_norm](*given), row_norm(*given))
