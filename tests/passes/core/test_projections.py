"""Linear maps of one input with their updates: the results of `projections` and their gradients."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from graftc.passes.core.ops import masked_products
from graftc.passes.core.ops import projections as module
from graftc.passes.core.ops.projections import projections

MAPS = (False, False, False)
UPDATES = ((0, 0, 0.5, ()), (1, 1, 2.0, ()), (1, 0, 1.0, ((0, 2), (4, 6))), (1, 1, 0.3, ()), (0, 2, 1.5, ()))
DROPPED = (None, 0.25)
MASK = torch.rand(200, 4, generator=torch.Generator().manual_seed(1)) > 0.25
COLUMNS = torch.tensor([0, 3, 5])


def tensors(dtype: torch.dtype = torch.float64, *lead: int) -> list[Tensor]:
    """Return two inputs, three weights, one bias and five pairs of factors, in the order that `split` reads."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(*(lead or (2, 3)), 4)] * 2 + [(5, 4), (5,), (6, 4), (4, 4)]
    shapes += [(2, 4), (5, 2), (1, 4), (3, 1), (2, 4), (4, 2), (3, 4), (6, 3), (1, 4), (5, 1)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


def split(given: Any) -> tuple[Any, ...]:
    """Return the tensors as arguments of `projections`."""
    x, z, w0, b0, w1, w2, *factors = given
    columns = [None, COLUMNS, None, None, None]
    pairs = [(factors[2 * i], factors[2 * i + 1], columns[i]) for i in range(5)]
    mask = MASK[: x[..., 0].numel()].view(x.shape)
    return x, (z, mask), ((w0, b0, None), (w1, None, None), (w2, None, None)), tuple(pairs)


def fused(*given: Tensor) -> tuple[Tensor, ...]:
    """Call the function under test."""
    return projections(*split(given), MAPS, UPDATES, DROPPED)


def plain(*given: Tensor) -> tuple[Tensor, ...]:
    """Compute the same with plain products."""
    x, (z, mask), weights, factors = split(given)
    sources = (x, z, x * mask / 0.75)
    results = [x @ w.mT + (0 if b is None else b) for w, b, _ in weights]
    for (of, source, scale, runs), (a, b, columns) in zip(UPDATES, factors, strict=True):
        width = results[of].shape[-1]
        own = columns if columns is not None else torch.cat([torch.arange(*run) for run in runs or ((0, width),)])
        results[of] = results[of].index_add(-1, own, scale * (sources[source] @ a.mT @ b.mT))
    return tuple(results)


@pytest.mark.slow
def test_results_and_gradients_are_those_of_plain_products() -> None:
    given = tensors()
    for a, b in zip(fused(*given), plain(*given), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(fused, given)


@pytest.mark.slow
@pytest.mark.sample("frozen1", "frozen3")
@pytest.mark.parametrize("frozen", [(), range(2, 6), (0, 6, 14), range(7, 16, 2)])
def test_gradients_have_gradients(frozen: Any) -> None:
    given = tensors()
    for number in frozen:
        given[number].requires_grad_(False)
    assert torch.autograd.gradgradcheck(fused, given)


def rescaled(x: Tensor, weight: Tensor, scale: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Call the function under test with a scale of rows that is also a factor of ``B``."""
    scaled = b * scale.detach()[:, None]
    return projections(x, (), ((weight, None, scale),), ((a, scaled, None),), (False,), ((0, 0, 0.5, ()),), ())[0]


def test_rows_are_rescaled_with_what_is_added() -> None:
    shapes = ((2, 3, 4), (5, 4), (5,), (2, 4), (5, 2))
    given = tuple(torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes)

    def by_hand(x: Tensor, weight: Tensor, scale: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return x @ (scale[:, None] * (weight + 0.5 * b @ a)).mT

    torch.testing.assert_close(rescaled(*given), by_hand(*given), rtol=1e-12, atol=1e-12)
    every = [[t for t in given if t is not given[4]], list(given)]
    for wanted in every:
        grads = torch.randn(2, 3, 5, dtype=torch.float64)
        mine, theirs = (torch.autograd.grad(make(*given), wanted, grads) for make in (rescaled, by_hand))
        for a, b in zip(mine, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)
    x = given[0]
    first = [torch.autograd.grad(make(*given).square().sum(), x, create_graph=True)[0] for make in (rescaled, by_hand)]
    mine, theirs = (torch.autograd.grad(g.square().sum(), (x, given[1], given[3])) for g in first)
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("used", range(3))
def test_what_nobody_reads_has_no_gradient(used: int) -> None:
    given = tensors()
    mine, theirs = (torch.autograd.grad(make(*given)[used].sum(), given, allow_unused=True) for make in (fused, plain))
    for a, b in zip(mine, theirs, strict=True):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("lead", [(0, 3), (3,), (2, 1, 3)])
def test_any_number_of_rows(lead: tuple[int, ...]) -> None:
    given = tensors(torch.float64, *lead)
    actual, expected = fused(*given), plain(*given)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    mine = torch.autograd.grad(sum(t.square().sum() for t in actual), given)
    theirs = torch.autograd.grad(sum(t.square().sum() for t in expected), given)
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_inputs_that_are_not_contiguous_and_weights_by_columns() -> None:
    x = torch.randn(4, 6, dtype=torch.float64).t().requires_grad_()
    weight, bias = torch.randn(4, 5, dtype=torch.float64, requires_grad=True), torch.randn(5, dtype=torch.float64)
    a, b = torch.randn(4, 2, dtype=torch.float64).t(), torch.randn(2, 5, dtype=torch.float64).t()

    def call(*given: Tensor) -> Tensor:
        x, weight, bias, a, b = given
        return projections(x, (), ((weight, bias, None),), ((a, b, None),), (True,), ((0, 0, 0.5, ()),), ())[0]

    given = (x, weight, bias.requires_grad_(), a.requires_grad_(), b.requires_grad_())
    torch.testing.assert_close(call(*given), x @ weight + bias + 0.5 * x @ a.mT @ b.mT)
    assert torch.autograd.gradcheck(call, given)


def test_factors_of_zero_change_no_bit() -> None:
    given = tensors(torch.float32)
    with torch.no_grad():
        for number in range(7, 16, 2):
            given[number].zero_()
    x, _, weights, _ = split(given)
    for (weight, bias, _), actual in zip(weights, fused(*given), strict=True):
        assert torch.equal(actual, torch.nn.functional.linear(x, weight, bias))


def test_masks_apply_to_many_rows() -> None:
    """Masks apply in blocks, and all at once if the gradients need gradients."""
    given = tensors(torch.float64, 200)
    masked_products._BLOCK, before = 4 * 64, masked_products._BLOCK
    try:
        mine, again = (
            torch.autograd.grad(sum(t.square().sum() for t in fused(*given)), given, create_graph=many)
            for many in (False, True)
        )
    finally:
        masked_products._BLOCK = before
    theirs = torch.autograd.grad(sum(t.square().sum() for t in plain(*given)), given)
    for a, b, c in zip(mine, again, theirs, strict=True):
        torch.testing.assert_close(a, c, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(b, c, rtol=1e-12, atol=1e-12)


def test_under_autocast_it_computes_as_products_do() -> None:
    given = tensors(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = fused(*given)
    expected = plain(*given)
    assert {t.dtype for t in actual} == {torch.bfloat16}
    mine = torch.autograd.grad(sum(t.float().square().sum() for t in actual), given)
    theirs = torch.autograd.grad(sum(t.square().sum() for t in expected), given)
    for a, b in zip((*actual, *mine), (*expected, *theirs), strict=True):
        assert (a - b).norm() <= 0.02 * b.norm()
    assert [g.dtype for g in mine] == [t.dtype for t in given]


def test_an_input_is_kept_once_and_weights_as_they_are() -> None:
    given = tensors(torch.float32, 64)
    for number in range(2, 6):
        given[number].requires_grad_(False)
    kept: list[Tensor] = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t)
    with hooks, torch.autocast("cpu", dtype=torch.bfloat16):
        fused(*given)
    wide = [t.dtype for t in kept if t.shape == (64, 4)]
    assert sorted(wide, key=str) == [torch.bfloat16] * 4 + [torch.bool]  # inputs, four ranks of both, and a mask
    own = {t.data_ptr() for t in given}
    assert all(t.data_ptr() in own for t in kept if t.shape in ((5, 4), (6, 4), (4, 4)))


@pytest.mark.slow
def test_functional_transforms_and_compilers_see_plain_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_Projections", None)
    given = tensors()
    x, (z, _), weights, pairs = split(given)

    def call(x: Tensor) -> tuple[Tensor, ...]:  # torch.func does not support dropout that saves a mask
        return projections(x, (z,), weights, pairs[:4], MAPS, UPDATES[:4], (None,))

    torch.func.grad(lambda x: call(x)[1].sum())(x)
    many = torch.func.vmap(lambda x: call(x)[1])(torch.stack([x] * 2))
    torch.testing.assert_close(many[1], plain(*given)[1])
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x.detach(), torch.ones_like(x))
        assert forward_ad.unpack_dual(call(dual)[0]).tangent is not None
    compiled = torch.compile(fused, backend="eager", fullgraph=True)
    for a, b in zip(compiled(*given), plain(*given), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_results_may_be_written_to() -> None:
    """As Python around a map may do: Longformer divides its queries in place."""
    given = tensors()
    grads = []
    for results in (fused(*given), plain(*given)):
        for result in results:
            result.div_(3)
        grads.append(torch.autograd.grad([result.sum() for result in results], given))
    torch.testing.assert_close(*grads, rtol=1e-12, atol=1e-12)


def test_nothing_that_others_read_is_written_to() -> None:
    given = tensors()
    before = [t.detach().clone() for t in given]
    results = fused(*given)
    copies = [t.detach().clone() for t in results]
    grads = [torch.randn_like(t) for t in results]
    kept = [g.clone() for g in grads]
    torch.autograd.grad(results, given, grads)
    for ours, theirs in ((given, before), (results, copies), (grads, kept)):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    addresses = [t.data_ptr() for t in results]
    assert all(a != b for a, b in pairwise(sorted(addresses)))
