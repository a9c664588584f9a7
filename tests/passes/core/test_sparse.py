"""Operators on weights of which some entries train."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from graftc.passes.core.method.entry_selection import drawn, largest, shares
from graftc.passes.core.ops.sparse import sparse_linear_decomposed, sparse_weight_decomposed
from graftc.passes.methods.bases import drop_and_grow

ops = torch.ops.graftc


def pieces(dtype: torch.dtype, transposed: bool, seed: int = 0) -> dict[str, Any]:
    """Return a map from 7 to 5, and two changes to it that share an entry."""
    draw = torch.Generator().manual_seed(seed)
    wide = torch.promote_types(dtype, torch.float32)

    def normal(*shape: int, kind: torch.dtype = dtype) -> Tensor:
        return torch.randn(*shape, generator=draw).to(kind)

    return {
        "x": normal(12, 7).requires_grad_() if transposed else normal(3, 4, 7).requires_grad_(),
        "weight": normal(7, 5) if transposed else normal(5, 7),
        "bias": normal(5).requires_grad_(),
        "indices": [torch.tensor([1, 4, 9, 33], dtype=torch.int32), torch.tensor([4, 8])],
        "deltas": [normal(4, kind=wide).requires_grad_(), normal(2, kind=wide).requires_grad_()],
    }


def call(function: Any, given: dict[str, Any], transposed: bool, sampled: bool) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Return the result, and the gradients of everything for one random gradient of the result."""
    result = function(*given.values(), transposed, sampled)
    torch.manual_seed(1)
    wanted = [given["x"], given["bias"], *given["deltas"]]
    return result, torch.autograd.grad(result, wanted, torch.randn(result.shape).to(result.dtype))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("sampled", [False, True])
def test_as_in_aten(dtype: torch.dtype, transposed: bool, sampled: bool) -> None:
    """Results are bit-identical, and gradients agree up to the order of sums."""
    given = pieces(dtype, transposed)
    actual, gradients = call(ops.sparse_linear.default, given, transposed, sampled)
    expected, wanted = call(sparse_linear_decomposed, given, transposed, sampled)
    assert torch.equal(actual, expected)
    for own, other in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-6 if dtype != torch.bfloat16 else 0, atol=1e-6)


@pytest.mark.parametrize("sampled", [False, True])
def test_gradients_by_differences(sampled: bool) -> None:
    """Gradients of the input, the weight, the bias and the changes are right."""
    given = pieces(torch.float64, False)
    inputs = (given["x"], given["weight"].requires_grad_(not sampled), given["bias"], *given["deltas"])

    def function(x: Tensor, weight: Tensor, bias: Tensor, *deltas: Tensor) -> Any:
        return ops.sparse_linear(x, weight, bias, given["indices"], list(deltas), False, sampled)

    assert torch.autograd.gradcheck(function, inputs)


@pytest.mark.slow
@pytest.mark.parametrize("transposed", [False, True])
def test_registered_soundly(transposed: bool) -> None:
    """The operators pass torch's own checks: dtypes, autograd, tracing."""
    given = pieces(torch.float32, transposed)
    torch.library.opcheck(ops.sparse_linear.default, (*given.values(), transposed, False))
    plain = (given["weight"], given["indices"][0], given["deltas"][0])
    torch.library.opcheck(ops.sparse_weight.default, plain)


def test_rounded_once() -> None:
    """A small change to a 16-bit weight is added in 32 bits: the sum is the nearest 16-bit number."""
    weight = torch.randn(40, 30).bfloat16()
    indices, delta = torch.arange(0, 1200, 7, dtype=torch.int32), torch.randn(172) * 1e-2
    actual = ops.sparse_weight(weight, indices, delta)
    exact = weight.flatten()[indices.long()].double() + delta.double()
    assert torch.equal(actual.flatten()[indices.long()], exact.float().bfloat16())
    assert torch.equal(actual, sparse_weight_decomposed(weight, indices, delta))
    rest = torch.ones(1200, dtype=torch.bool)
    rest[indices.long()] = False
    assert torch.equal(actual.flatten()[rest], weight.flatten()[rest])


def test_where_torch_has_to_be_deterministic() -> None:
    """The result is the same with deterministic algorithms."""
    weight, indices, delta = torch.randn(9, 5).bfloat16(), torch.arange(0, 45, 4, dtype=torch.int32), torch.randn(12)
    expected = ops.sparse_weight(weight, indices, delta)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.equal(ops.sparse_weight(weight, indices, delta), expected)
    finally:
        torch.use_deterministic_algorithms(False)


def test_only_the_input_is_kept() -> None:
    """Nothing is saved beyond tensors that exist anyway: no changed weight, and no gradient of one."""
    weight = torch.randn(50, 70)
    x = torch.randn(9, 70, requires_grad=True)
    indices, delta = torch.arange(0, 3500, 3, dtype=torch.int32), torch.zeros(1167, requires_grad=True)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        ops.sparse_linear(x, weight, None, [indices], [delta], False, False)
    own = {t.data_ptr() for t in (weight, x, indices, delta)}
    assert {t.data_ptr() for t in kept} <= own


def test_under_autocast() -> None:
    """It computes as the base's own product does under autocast."""
    given = pieces(torch.float32, False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = ops.sparse_linear(*given.values(), False, True)
        expected = sparse_linear_decomposed(*given.values(), False, True)
    assert actual.dtype == expected.dtype == torch.bfloat16
    assert torch.equal(actual, expected)
    grads = [torch.autograd.grad(y.float().square().sum(), given["deltas"]) for y in (actual, expected)]
    for own, other in zip(*grads, strict=True):
        torch.testing.assert_close(own, other, rtol=0.02, atol=0.05)


@pytest.mark.parametrize("count", [0, 1, 7, 30, 60])
def test_largest_exactly(count: int) -> None:
    """Exactly the requested number is chosen, the first among ties, and NaN last."""
    draw = torch.Generator().manual_seed(count)
    groups = [torch.randint(0, 4, (size,), generator=draw).float() for size in (20, 1, 39)]
    groups[0][3] = float("nan")
    chosen = largest([lambda g=g: g for g in groups], count)
    assert sum(f.numel() for f in chosen) == count
    every = torch.cat(groups).nan_to_num(nan=-1)
    order = sorted(range(60), key=lambda i: (-float(every[i]), i))[:count]
    starts = (0, 20, 21)
    assert sorted(int(i) + s for f, s in zip(chosen, starts, strict=True) for i in f) == sorted(order)


@pytest.mark.parametrize("count", [1, 9, 40, 100])
def test_largest_gradients_are_those_of_the_whole_weight(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Searching a weight a few entries at a time gives the same choice, also with ties and NaN."""
    monkeypatch.setattr(drop_and_grow, "BLOCK", 7)
    values = torch.randint(-9, 9, (100,), generator=torch.Generator().manual_seed(count)).bfloat16()
    values[[5, 60]] = float("nan")
    whole = largest([values.abs], count)[0]
    assert torch.equal(drop_and_grow._largest_sizes(values, count), whole)


def test_shares() -> None:
    """Shares are proportional, with an exact total or with all of them rounded down."""
    sizes = [10, 1, 33, 56]
    assert sum(shares(37, sizes)) == 37 and all(0 <= c <= s for c, s in zip(shares(37, sizes), sizes, strict=True))
    assert shares(37, sizes, exact=False) == [37 * s // 100 for s in sizes]
    assert shares(100, sizes) == sizes
    assert len(set(drawn(30, 33, torch.Generator().manual_seed(0)).tolist())) == 30
