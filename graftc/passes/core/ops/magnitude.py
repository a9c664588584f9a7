"""Operators on the rows of a weight, which compute the row norms of an adapted weight and rescale a result by row.

`row_norm` does not compute the adapted weight: the squared norm of a row of ``W + s B A`` is
``|W|^2 + 2 s <W, B A> + s^2 |B A|^2``, where the last two terms are sums over products of the size of ``B``. Only rows
in which these terms cancel are computed in full, since rounding errors would dominate the remainder. `rescale` saves
one tensor of its result's size for the backward pass; with ``whole``, this is the result itself, which its readers
often save as well.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from graftc.passes.core.ops.declaring import like_first, operator

aten = torch.ops.aten

SMALLEST = 1e-24
"""Lower bound on squared norms: a row of zeros has a norm of 1e-12, so that division by the norm is safe."""

_BLOCK = 2**22
"""Number of weight elements widened at a time."""

_CANCELS = 1 / 16
"""Terms are treated as cancelling if their sum is less than this fraction of their size: the sum's error is then 16
times as large."""

TINY = 1e-30
"""Replacement for a scale of exactly zero, so that the backward pass can divide by it."""


def squares(weight: Tensor) -> Tensor:
    """Return the sum of squares of each row of ``[..., rows, in]``, split into two float32 values: ``[2, ..., rows]``.

    The sum is computed in float64. The first value is the sum rounded to float32, the second the remainder, so that
    float32 arithmetic effectively uses only the first, and float64 arithmetic the full sum. For a float64 weight, both
    are float64.
    """
    kept = torch.promote_types(weight.dtype, torch.float32)
    exact = torch.cat([part.double().square().sum(-1) for part in _blocks(weight, weight)], dim=-1)
    rounded = exact.to(kept)
    return torch.stack([rounded, (exact - rounded.double()).to(kept)])


def _blocks(tensor: Tensor, weight: Tensor) -> list[Tensor]:
    """Split a tensor with the same rows as ``weight`` into blocks of rows."""
    rows = weight.shape[-2]
    size = max(1, _BLOCK * rows // max(1, weight.numel()))
    return [tensor.narrow(-2, start, min(size, rows - start)) for start in range(0, rows, size)]


def norm_of_squares(square: Tensor) -> Tensor:
    """Return the row norms for the result of `squares`: ``[..., rows]``, in the same dtype."""
    return square.sum(0).clamp_min(SMALLEST).sqrt()


def wide_product(weight: Tensor, a: Tensor) -> Tensor:
    """Return ``weight @ a.mT`` in ``a``'s dtype, ``[..., rows, rank]``, widening a 16-bit weight in blocks of rows."""
    other = a.transpose(-1, -2)
    if weight.dtype == a.dtype:
        return weight @ other
    return torch.cat([part.to(a.dtype) @ other for part in _blocks(weight, weight)], dim=-2)


def _back_product(weight: Tensor, rows: Tensor) -> Tensor:
    """Return ``rows.mT @ weight`` in the dtype of ``rows: [..., rows, rank]``: ``[..., rank, in]``."""
    if weight.dtype == rows.dtype:
        return rows.transpose(-1, -2) @ weight
    total = rows.new_zeros(*rows.shape[:-2], rows.shape[-1], weight.shape[-1])
    for part, own in zip(_blocks(weight, weight), _blocks(rows, weight), strict=True):
        total += own.transpose(-1, -2) @ part.to(rows.dtype)
    return total


def row_norm_decomposed(square: Tensor, weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """Compute `row_norm` in ATen without inspecting values: every row is computed both ways, since terms may cancel."""
    a, b = a.to(square.dtype), b.to(square.dtype)
    total, cancels = _expanded(square, weight, a, b, scale)
    direct = torch.cat([row.square().sum(-1) for row in _adapted(weight, a, b, scale)], dim=-1)
    return torch.where(cancels, direct, total).clamp_min(SMALLEST).sqrt()


def _expanded(square: Tensor, weight: Tensor, a: Tensor, b: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Return the squared norms as sums of three terms, and a mask of the rows where these cancel: ``[..., rows]``."""
    base, update = square.sum(0), b @ (a @ a.transpose(-1, -2))
    both = torch.add(wide_product(weight, a), update, alpha=scale / 2)
    total = torch.add(base, (both * b).sum(-1), alpha=2 * scale)
    return total, total < _CANCELS * torch.add(base, (update * b).sum(-1), alpha=scale**2)


def _adapted(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> list[Tensor]:
    """Return ``weight + scale * b @ a`` in the dtype of ``a``, in blocks of rows."""
    blocks = zip(_blocks(weight, weight), _blocks(b, weight), strict=True)
    return [torch.add(part.to(a.dtype), own @ a, alpha=scale) for part, own in blocks]


def _cancelling(
    cancels: Tensor, weight: Tensor, a: Tensor, b: Tensor
) -> Iterator[tuple[tuple[int, ...], Tensor, tuple[Tensor, Tensor, Tensor]]]:
    """Yield the rows in which terms cancel, one matrix after another.

    Each item contains the matrix's index, the row indices and, in float64, these rows of the weight, all of ``a``, and
    these rows of ``b``.
    """
    if not cancels.any():
        return
    leading = cancels.shape[:-1]
    weight, a, b = (t.expand(*leading, *t.shape[-2:]) for t in (weight, a, b))
    for where in map(tuple, itertools.product(*map(range, leading))):
        rows = cancels[where].nonzero()[:, 0]
        if len(rows):
            yield where, rows, (weight[where][rows].double(), a[where].double(), b[where][rows].double())


def _norm_like(square: Tensor, weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    return square.new_empty(torch.broadcast_shapes(square.shape[1:], b.shape[:-1]))  # type: ignore[no-untyped-call]


def _norm_setup(ctx: Any, inputs: Sequence[Any], output: Tensor) -> None:
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors, output)


def _norm_backward(ctx: Any, grad: Tensor) -> tuple[None, None, Tensor, Tensor, None]:
    square, weight, a, b, norm = ctx.saved_tensors
    wide = square.dtype
    grads = torch.ops.graftc.row_norm_backward(grad, square, weight, a.to(wide), b.to(wide), norm, ctx.scale)
    return None, None, grads[0].to(a.dtype), grads[1].to(b.dtype), None


def _factors_like(grad: Tensor, square: Tensor, weight: Tensor, a: Tensor, b: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(a), torch.empty_like(b)


@operator(_factors_like)
def row_norm_backward(
    grad: Tensor, square: Tensor, weight: Tensor, a: Tensor, b: Tensor, norm: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Return the gradients of `row_norm` for ``a`` and ``b``, both in the dtype of ``square``."""
    clamped = norm.square() <= 1.000001 * SMALLEST
    each = torch.where(clamped, 0, scale * grad / norm)[..., None]
    if weight.device.type != "cpu":
        adapted = torch.cat(_adapted(weight, a, b, scale), dim=-2)
        return (each * b).transpose(-1, -2) @ adapted, each * (adapted @ a.transpose(-1, -2))
    cancels = _expanded(square, weight, a, b, scale)[1]
    usual = each.masked_fill(cancels[..., None], 0)
    rows = usual * b
    grad_b = usual * (wide_product(weight, a) + scale * (b @ (a @ a.transpose(-1, -2))))
    grad_a = _back_product(weight, rows) + scale * (rows.transpose(-1, -2) @ b) @ a
    for where, numbers, own in _cancelling(cancels, weight, a, b):
        adapted, factor = torch.cat(_adapted(*own, scale)), each[where][numbers]
        grad_b[where].index_copy_(0, numbers, (factor * (adapted @ own[1].transpose(-1, -2))).to(grad_b.dtype))
        grad_a[where] += ((factor * own[2]).transpose(-1, -2) @ adapted).to(grad_a.dtype)
    return grad_a, grad_b


@operator(_norm_like, plain=row_norm_decomposed, gradient=(_norm_setup, _norm_backward))
def row_norm(square: Tensor, weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """Return the row norms of ``weight + scale * b @ a``, in the dtype of ``square``, even under autocast.

    Rows that nearly vanish are as accurate as others. With ``b = 0``, the result equals that of `norm_of_squares` bit
    for bit. ``a`` and ``b`` have gradients; detach them to treat the norm as a constant in the backward pass. The
    gradient itself is not differentiable: torch refuses a second backward pass through it.

    Args:
        square: the result of `squares` for the weight, ``[2, ..., rows]``, float32 or float64.
        weight: ``[..., rows, in]``, a constant.
        a: ``[..., rank, in]``.
        b: ``[..., rows, rank]``.
        scale: scale of the product.

    Returns:
        The norms, ``[..., rows]``.
    """
    device = weight.device.type
    with torch.autocast(device, enabled=False):
        if device != "cpu":  # inspecting values would wait for the device, and cannot be captured in its graphs
            return row_norm_decomposed(square, weight, a, b, scale)
        a, b = a.to(square.dtype), b.to(square.dtype)
        total, cancels = _expanded(square, weight, a, b, scale)
        for where, rows, own in _cancelling(cancels, weight, a, b):
            total[where].index_copy_(0, rows, torch.cat(_adapted(*own, scale)).square().sum(-1).to(total.dtype))
        return total.clamp_min_(SMALLEST).sqrt_()


def rescale_decomposed(
    x: Tensor, scale: Tensor, delta: Tensor | None, offset: Tensor | None, lost: Tensor | None, whole: bool
) -> Tensor:
    """Compute `rescale` in ATen."""
    result = x * scale if delta is None else x * scale + delta
    fixed = _fixed(offset, lost)
    return (result if fixed is None else result + (1 - scale) * fixed).to(x.dtype)


def _fixed(offset: Tensor | None, lost: Tensor | None) -> Tensor | None:
    if offset is None or lost is None:
        return offset if lost is None else lost
    return lost + offset


def nonzero(scale: Tensor) -> Tensor:
    """Return a scale by which it is safe to divide: zeros become `TINY`."""
    return torch.where(scale == 0, TINY, scale)


def _rescale_setup(ctx: Any, inputs: Sequence[Any], output: Tensor) -> None:
    x, scale, _, offset, lost, ctx.whole = inputs
    ctx.shapes = tuple(None if t is None else (t.shape, t.dtype) for t in (offset, lost))
    ctx.shift = lost is None and offset is not None and offset.shape == scale.shape
    kept = None
    if ctx.needs_input_grad[1]:
        kept = output if ctx.whole else x
        if not ctx.shift and (fixed := _fixed(offset, lost)) is not None:
            kept = torch.sub(x, fixed, out=torch.empty_like(x))
    ctx.save_for_backward(scale, kept, offset if ctx.shift else None)


def _rescale_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    scale, kept, offset = ctx.saved_tensors
    needs = ctx.needs_input_grad
    used = nonzero(scale) if ctx.whole else scale
    grad_x = (grad * used).to(grad.dtype) if needs[0] else None
    grad_scale = None
    if kept is not None:
        grad_scale, summed = column_sums(grad, kept, scale)
        if ctx.whole:
            grad_scale = grad_scale / used
        elif offset is not None:
            grad_scale = grad_scale - offset * summed
    rest = (1 - scale) * grad if needs[3] or needs[4] else None
    others = (
        _sum_to(rest, *like) if need and like is not None and rest is not None else None
        for need, like in zip(needs[3:5], ctx.shapes, strict=True)
    )
    return grad_x, grad_scale, grad if needs[2] else None, *others, None


def column_sums(grad: Tensor, other: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sums of ``grad * other`` and of ``grad`` over the axes along which ``like`` was broadcast."""
    if like.dim() == 1 and grad.dtype == other.dtype == like.dtype:
        # A layer norm's gradients of gain and shift are these sums, computed in one pass without a tensor of products.
        rows = [t.reshape(-1, like.shape[0]) for t in (grad, other)]
        ones = like.new_ones(rows[0].shape[0], 1)
        _, products, sums = aten.native_layer_norm_backward(
            *rows, [like.shape[0]], torch.zeros_like(ones), ones, like, like, [False, True, True]
        )
        return products, sums
    return _sum_to(grad * other, like.shape, like.dtype), _sum_to(grad, like.shape, like.dtype)


def _sum_to(value: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Sum ``value`` over the axes along which a tensor of this shape was broadcast to ``value``'s shape."""
    leading = value.dim() - len(shape)
    wide = torch.promote_types(dtype, torch.float32)
    if leading:
        value = value.sum(list(range(leading)), dtype=wide)
    ones = [i for i, size in enumerate(shape) if size == 1]
    if ones:
        value = value.sum(ones, keepdim=True, dtype=wide)
    return value.to(dtype)


@operator(like_first, plain=rescale_decomposed, gradient=(_rescale_setup, _rescale_backward))
def rescale(
    x: Tensor, scale: Tensor, delta: Tensor | None, offset: Tensor | None, lost: Tensor | None, whole: bool
) -> Tensor:
    """Return ``scale * x + delta + (1 - scale) * (offset + lost)``.

    This scales ``x`` except for its fixed parts, ``offset`` and ``lost``, and adds a ``delta`` that is already scaled.
    With a scale of one and a delta of zero, no bit of ``x`` changes. The computation uses the wider of the dtypes of
    ``x`` and ``scale``; the result has the dtype of ``x``, even under autocast.

    Args:
        x: any shape.
        scale: broadcasts to ``x``.
        delta: like ``x``.
        offset: broadcasts to ``x``; a bias, in both train and eval mode.
        lost: broadcasts to ``x``; the part of ``x`` that dropout removed in training. None in eval mode.
        whole: whether ``delta`` was computed with the detached ``scale`` as a factor, so that the gradient of ``scale``
            must account for both uses; the result, rather than ``x``, is saved for this. ``offset`` and ``lost`` must
            then be None. A scale of zero counts as `TINY`, here and in ``delta``; float16 cannot represent this value.

    Returns:
        A tensor like ``x``.
    """
    if whole:
        scale = nonzero(scale)
    result = torch.empty_like(x)  # in the layout of x, for which readers may have been compiled
    if delta is None:
        torch.mul(x, scale, out=result)
    else:
        torch.addcmul(delta, x, scale, out=result)
    for fixed in (offset, lost):
        if fixed is not None:
            result += (1 - scale) * fixed
    return result
