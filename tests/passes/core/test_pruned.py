"""Pruned weights: which entries are kept, the operator, its gradients, and its decomposition."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from graftc.passes.core.ops.decompositions import DECOMPOSITIONS
from graftc.passes.core.ops.pruned import dropped, edge_of

pruned_weight = torch.ops.graftc.pruned_weight.default


def drawn(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    """Return normally distributed values."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def edges(scores: Tensor, kept: int, groups: int = 1) -> tuple[Tensor, Tensor]:
    """Return the thresholds and last positions that keep so many entries of each group."""
    wide = scores.to(torch.promote_types(scores.dtype, torch.float32))
    pairs = [edge_of([group], kept)[0] for group in wide.reshape(groups, -1)]
    return torch.stack([t for t, _ in pairs]), torch.stack([n for _, n in pairs])


def kept_by_sorting(scores: Tensor, kept: int) -> Tensor:
    """Return a mask of the largest entries, the first ones among equals, by a stable sort."""
    order = scores.flatten().double().argsort(descending=True, stable=True)
    result = torch.zeros(scores.numel(), dtype=torch.bool).index_fill_(0, order[:kept], True)
    return result.view(scores.shape)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(7, 9), (63, 1), (1, 63), (3, 7, 3)])
def test_exactly_as_many_stay(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """The entries that a stable sort puts first are kept, with many ties and with none."""
    for scores in (drawn(*shape, dtype=dtype), (drawn(*shape) * 2).round().to(dtype), torch.zeros(shape, dtype=dtype)):
        for kept in (1, 2, 31, 62, 63):
            stays = ~dropped(scores, *edges(scores, kept))
            assert int(stays.sum()) == kept
            assert torch.equal(stays, kept_by_sorting(scores, kept))


def test_every_group_has_its_own() -> None:
    scores = (drawn(4, 5, 6) * 2).round()
    stays = ~dropped(scores, *edges(scores, 11, groups=4))
    assert all(torch.equal(own, kept_by_sorting(s, 11)) for own, s in zip(stays, scores, strict=True))


def test_groups_that_share_a_threshold() -> None:
    """The largest of all are kept, those of the first groups among equals; a group may lose all of its entries."""
    groups = [(drawn(size, seed=size) * 2).round() for size in (9, 20, 11)]
    for scores in (groups, [g - 10 * i for i, g in enumerate(groups)], [torch.zeros_like(g) for g in groups]):
        for kept in (1, 8, 9, 10, 29, 39, 40):
            thresholds = edge_of(scores, kept)
            stays = [~dropped(s[None], t[None], n[None])[0] for s, (t, n) in zip(scores, thresholds, strict=True)]
            assert torch.equal(torch.cat(stays), kept_by_sorting(torch.cat(scores), kept))


def test_what_is_no_number_shows() -> None:
    """NaN is chosen last, and stays in the result."""
    scores = torch.tensor([[1.0, torch.nan, 3.0, 2.0]])
    threshold, last = edges(scores, 2)
    assert dropped(scores, threshold, last).tolist() == [[True, False, False, False]]
    weight = torch.tensor([[1.0, torch.nan, 3.0, -2.0]])
    assert bool(pruned_weight(weight, None, *edges(weight.abs(), 1))[0, 1].isnan())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_of_it_is_the_weight_to_the_bit(dtype: torch.dtype) -> None:
    weight = drawn(7, 9, dtype=dtype)
    weight[0, 0] = -0.0
    for scores in (None, torch.zeros(7, 9)):
        actual = pruned_weight(weight, scores, torch.tensor([-torch.inf]), torch.tensor([-1]))
        assert actual.dtype == dtype and torch.equal(actual.view(torch.uint8), weight.view(torch.uint8))
        assert actual.data_ptr() != weight.data_ptr()


@pytest.mark.parametrize("scored", [False, True])
@pytest.mark.parametrize("groups", [1, 3])
def test_gradients(scored: bool, groups: int) -> None:
    """Gradients are those of dense tensors with the mask as a constant, and straight-through ones for scores."""
    weight = drawn(3, 7, 5).requires_grad_()
    scores = drawn(3, 7, 5, seed=1).requires_grad_() if scored else None
    given = (weight if scores is None else scores).detach()
    edge = edges(given.abs() if scores is None else given, 35 // groups, groups)
    mask = (~dropped(given.abs() if scores is None else given, *edge)).double().requires_grad_()
    factor = drawn(3, 7, 5, seed=2)
    (pruned_weight(weight, scores, *edge) * factor).sum().backward()
    dense = weight.detach().clone().requires_grad_()
    (dense * mask * factor).sum().backward()
    assert weight.grad is not None and dense.grad is not None and mask.grad is not None
    assert torch.equal(weight.grad, dense.grad)
    assert bool((weight.grad == 0).any()) and bool((weight.grad != 0).any())
    if scores is not None:
        assert scores.grad is not None
        assert torch.equal(scores.grad, mask.grad) and bool((scores.grad != 0).all())
    fixed = None if scores is None else scores.detach()
    between = (edge[0] - 1e-4, edge[1])  # a step of the numeric derivative must not change the choice
    assert torch.autograd.gradcheck(lambda w: pruned_weight(w, fixed, *between), (weight,))


def test_gradients_in_16_bits() -> None:
    """Scores and the products for them are in float32, also under autocast, which changes no dtype."""
    weight, scores = drawn(7, 9, dtype=torch.bfloat16), drawn(7, 9, dtype=torch.float32, seed=1)
    weight.requires_grad_(), scores.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = pruned_weight(weight, scores, *edges(scores.detach(), 20))
    assert result.dtype == torch.bfloat16
    factor = drawn(7, 9, dtype=torch.bfloat16, seed=2)
    result.backward(factor)
    assert weight.grad is not None and scores.grad is not None
    assert weight.grad.dtype == torch.bfloat16 and scores.grad.dtype == torch.float32
    assert torch.equal(scores.grad, weight.detach().float() * factor.float())
    single = drawn(7, 9, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert pruned_weight(single, None, *edges(single.abs(), 5)).dtype == torch.float32


def test_nothing_else_is_saved() -> None:
    """Only the weight, the scores and two numbers are saved, and no mask."""
    weight, scores = drawn(7, 9).requires_grad_(), drawn(7, 9, seed=1).requires_grad_()
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):
        pruned_weight(weight, scores, *(edge := edges(scores.detach(), 20)))
    assert set(saved) == {t.data_ptr() for t in (weight, scores, *edge)}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_decomposition_is_the_kernel(dtype: torch.dtype) -> None:
    weight, scores = (drawn(3, 4, 5) * 2).round().to(dtype), (drawn(3, 4, 5, seed=1) * 2).round().float()
    for given, own in ((None, weight.abs()), (scores, scores)):
        arguments = (weight, given, *edges(own, 7, groups=3))
        assert torch.equal(DECOMPOSITIONS[pruned_weight](*arguments), pruned_weight(*arguments))


@pytest.mark.full
@pytest.mark.slow
def test_opcheck() -> None:
    weight, scores = drawn(6, 4).requires_grad_(), drawn(6, 4, seed=1).requires_grad_()
    for arguments in (
        (weight, scores, *edges(scores.detach(), 7, groups=2)),
        (weight, None, *edges(weight.detach().abs(), 7)),
        (drawn(4, 6).T.requires_grad_(), scores, *edges(scores.detach(), 7)),
    ):
        torch.library.opcheck(pruned_weight, arguments)
