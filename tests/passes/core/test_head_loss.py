"""A head and its cross-entropy in one operator: the results of torch on full logits, without storing logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from graftc.passes.core.ops import head_loss as module
from graftc.passes.core.ops.head_loss import MEAN, NONE, SUM
from graftc.specs.errors.diagnostics import GraftError
from tests.kit.settings import small_chunks

head_loss = torch.ops.graftc.head_loss.default
ROWS, WIDTH, VOCABULARY = 11, 6, 17


def factors(parts: int, bias: bool, dtype: torch.dtype = torch.float64) -> list[Any]:
    """Return hidden states, weights, a bias and first rows of the vocabulary.

    The second part is a product of two factors in addition to the weight; the third covers the last three rows of the
    vocabulary.
    """
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    x, first = drawn(ROWS, WIDTH), VOCABULARY - 3 if parts == 3 else VOCABULARY
    xs, weights, starts = [x], [drawn(first, WIDTH)], [0]
    if parts == 3:
        xs, weights, starts = [x, x], [*weights, drawn(3, WIDTH)], [0, first]
    if parts > 1:
        xs, weights, starts = [*xs, drawn(ROWS, 2)], [*weights, drawn(VOCABULARY, 2)], [*starts, 0]
    return [xs, weights, drawn(VOCABULARY) if bias else None, starts]


def reference(
    xs: list[Tensor],
    weights: list[Tensor],
    bias: Tensor | None,
    labels: Tensor,
    starts: list[int],
    ignored: int = -100,
    reduction: int = MEAN,
    smoothing: float = 0.0,
    scale: float = 1.0,
    cap: float | None = None,
    square: float = 0.0,
) -> Tensor:
    total = torch.zeros((), dtype=xs[0].dtype)
    for x, weight, start in zip(xs, weights, starts, strict=True):
        total = total + functional.pad(x @ weight.t(), (start, VOCABULARY - start - len(weight)))
    total = total if bias is None else total + bias
    logits = scale * total if cap is None else cap * torch.tanh(scale / cap * total)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    how = dict(ignore_index=ignored, label_smoothing=smoothing)
    losses = functional.cross_entropy(logits, labels, reduction="none", **how)  # type: ignore[arg-type]
    losses = losses + square * torch.where(labels == ignored, 0, logits.logsumexp(-1) ** 2)
    count = (labels != ignored).sum()
    return losses if reduction == NONE else losses.sum() if reduction == SUM else losses.sum() / count


def results(function: Any, given: list[Any], labels: Tensor, outer: Tensor, **options: Any) -> list[Tensor]:
    """Return the loss and the gradients of all tensors that require one."""
    xs, weights, bias, starts = given
    leaves = list({id(t): t for t in (*xs, *weights, bias) if t is not None and t.requires_grad}.values())
    loss = function(xs, weights, bias, labels, starts, **options)
    return [loss.detach(), *torch.autograd.grad((loss * outer).sum(), leaves)]


def some_labels(*without: int) -> Tensor:
    labels = torch.randint(0, VOCABULARY, (ROWS,), generator=torch.Generator().manual_seed(1))
    labels[list(without)] = -100
    return labels


@pytest.mark.slow
@given(
    parts=st.integers(1, 3),
    bias=st.booleans(),
    rows=st.sampled_from([1, 4, 5, 11, 64]),
    without=st.sets(st.integers(0, ROWS - 1), max_size=ROWS - 1),
    reduction=st.sampled_from([NONE, MEAN, SUM]),
    smoothing=st.sampled_from([0.0, 0.1]),
    scale=st.sampled_from([1.0, 0.5]),
    cap=st.sampled_from([None, 3.0]),
    square=st.sampled_from([0.0, 0.01]),
    frozen=st.booleans(),
)
def test_it_is_the_loss_of_whole_logits(
    parts: int, bias: bool, rows: int, without: set[int], reduction: int, frozen: bool, **options: Any
) -> None:
    labels, given_ = some_labels(*without), factors(parts, bias)
    if frozen:
        for tensor in (*given_[1], given_[2]):
            _ = tensor is None or tensor.requires_grad_(False)
    outer = torch.linspace(1, 2, ROWS, dtype=torch.float64) if reduction == NONE else torch.tensor(3.0).double()
    with pytest.MonkeyPatch.context() as patch:
        small_chunks(patch, rows)
        actual = results(head_loss, given_, labels, outer, reduction=reduction, **options)
    expected = results(reference, given_, labels, outer, reduction=reduction, **options)
    for mine, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-13)


def test_another_label_is_left_out_as_well() -> None:
    labels = some_labels().remainder(5)
    actual = results(head_loss, factors(1, True), labels, torch.ones(()), ignored=3)
    expected = results(reference, factors(1, True), labels, torch.ones(()), ignored=3)
    assert (labels == 3).any()
    for mine, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize(("reduction", "value"), [(MEAN, float("nan")), (SUM, 0.0)])
def test_without_labels_the_loss_is_torchs_and_gradients_are_zero(reduction: int, value: float) -> None:
    loss, *grads = results(head_loss, factors(2, True), some_labels(*range(ROWS)), torch.ones(()), reduction=reduction)
    assert torch.equal(loss.nan_to_num(7), torch.tensor(value).double().nan_to_num(7))
    assert all(torch.equal(grad, torch.zeros_like(grad)) for grad in grads)


def test_two_backward_passes_give_the_same() -> None:
    xs, weights, bias, starts = factors(2, True)
    loss = head_loss(xs, weights, bias, some_labels(2), starts)
    first = torch.autograd.grad(loss, [*xs, *weights, bias], retain_graph=True)
    second = torch.autograd.grad(2 * loss, [*xs, *weights, bias])
    assert all(torch.equal(2 * a, b) for a, b in zip(first, second, strict=True))


def test_there_is_no_second_gradient() -> None:
    xs, weights, bias, starts = factors(1, False)
    with pytest.raises(GraftError, match="GC152"):
        torch.autograd.grad(head_loss(xs, weights, bias, some_labels(), starts), xs, create_graph=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_16_bits_there_is_one_rounding_more(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error against float64 is at most one rounding above that of full logits, because gradients wait for that of
    the loss in 16 bits.
    """
    small_chunks(monkeypatch, 4)
    labels, narrow = some_labels(0, 5), factors(2, True, dtype)
    wide = [*([t.detach().double().requires_grad_() for t in part] for part in narrow[:2])]
    wide += [narrow[2].detach().double().requires_grad_(), narrow[3]]
    exact = results(reference, wide, labels, torch.ones(()))
    actual, whole = (results(f, narrow, labels, torch.ones(())) for f in (head_loss, reference))
    assert actual[0].dtype == torch.float32
    for mine, theirs, right in zip(actual, whole, exact, strict=True):
        assert mine.dtype == theirs.dtype
        error, usual = ((t.double() - right).norm() / right.norm() for t in (mine, theirs))
        assert error <= usual + torch.finfo(dtype).eps / 2


def test_a_scaled_loss_does_not_underflow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients that are too small for float16 are right when multiplied by the scale of the loss."""
    xs, weights, bias, starts = factors(1, False, torch.float16)
    wide = [[t[0].detach().double().requires_grad_()] for t in (xs, weights)]
    _, right, _ = results(reference, [*wide, bias, starts], some_labels(), torch.tensor(65536e-7).double())
    loss = head_loss(xs, weights, bias, some_labels(), starts) * 1e-7
    (actual, _) = torch.autograd.grad(loss * 65536, [xs[0], weights[0]])
    torch.testing.assert_close(actual.double(), right, rtol=1e-2, atol=1e-5)


def test_autocast_decides_the_products() -> None:
    given_, labels = factors(1, True, torch.float32), some_labels(1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = results(head_loss, given_, labels, torch.ones(()))
    xs, weights, bias, starts = given_
    narrow = [[t.bfloat16() for t in part] for part in (xs, weights, [bias])]
    expected = head_loss(*narrow[:2], narrow[2][0], labels, starts)
    assert torch.equal(actual[0], expected.detach())
    assert all(grad.dtype == torch.float32 for grad in actual)


def test_nothing_is_kept_without_gradients_and_no_logits_with_them(monkeypatch: pytest.MonkeyPatch) -> None:
    small_chunks(monkeypatch, 4)
    xs, weights, bias, starts = factors(1, False)
    weights[0].requires_grad_(False)
    kept: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        with torch.no_grad():
            assert not head_loss(xs, weights, bias, some_labels(), starts).requires_grad
        assert not kept
        head_loss(xs, weights, bias, some_labels(), starts)
    assert sum(kept) <= ROWS * WIDTH + 2


def test_chunks_have_rows_by_bytes() -> None:
    assert module.chunk_rows(128_256, torch.bfloat16) == module.CHUNK_ROWS["cpu"]
    rows = module.chunk_rows(1000, torch.float32)
    assert rows * 4000 <= module.CHUNK_BYTES["cpu"] < (rows + 1) * 4000
    assert module.chunk_rows(1000, torch.float64) == rows // 2
