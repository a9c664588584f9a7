"""Dropout that keeps one byte per element for the backward pass: one operator draws the mask, another applies it.

Only `random_mask` draws. `masked_dropout` is a function of its arguments, so that any number of values can lose the
same entries.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

LEVELS = 2**16
"""The probability of dropping an element is a multiple of one over this."""

_PART = 2**15
"""How many elements are drawn at a time: their numbers stay in the cache."""

_SHARED = 4
"""How many elements share one number of the generator, 16 bits each."""


def level(p: float) -> int:
    """Return how many of `LEVELS` numbers drop an element: the nearest to ``p``, but never all."""
    return min(round(p * LEVELS), LEVELS - 1)


def factor(p: float) -> float:
    """Return the factor of kept elements, from the rounded probability, so that the expectation is exact."""
    return LEVELS / (LEVELS - level(p))


def random_mask_decomposed(like: Tensor, p: float) -> Tensor:
    """Compute `random_mask` in ATen, with other draws of the same distribution."""
    return torch.rand_like(like, dtype=torch.float32) >= level(p) / LEVELS


@torch.library.custom_op("graftc::random_mask", mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,))
def random_mask(like: Tensor, p: float) -> Tensor:
    """Draw the mask of elements that stay from torch's generator of the device.

    Args:
        like: tensor that determines the shape and device.
        p: probability of dropping an element, in ``[0, 1)``; rounded to a multiple of ``1 / 65536``, below one.

    Returns:
        ``bool`` of ``like``'s shape, contiguous.
    """
    if like.device.type != "cpu":
        return torch.empty(like.shape, dtype=torch.bool, device=like.device).bernoulli_(1 - level(p) / LEVELS)
    # Drawing 64 bits for four elements and comparing 16 each takes a fifth of the time of `bernoulli_`.
    count, least = like.numel(), level(p) - LEVELS // 2
    mask = torch.empty(count, dtype=torch.bool)
    drawn = torch.empty(-(-min(count, _PART) // _SHARED), dtype=torch.int64)
    for start in range(0, count, _PART):
        part = mask[start : start + _PART]
        numbers = drawn.random_(-(2**63), None).view(torch.int16)
        torch.ge(numbers[: part.numel()], least, out=part)
    return mask.view(like.shape)


@random_mask.register_fake
def _(like: Tensor, p: float) -> Tensor:
    return like.new_empty(like.shape, dtype=torch.bool)


def masked_dropout_decomposed(x: Tensor, mask: Tensor, p: float) -> Tensor:
    """Compute `masked_dropout` in ATen."""
    return torch.where(mask, x, 0.0) * factor(p)


@torch.library.custom_op("graftc::masked_dropout", mutates_args=(), tags=(torch.Tag.pointwise,))
def masked_dropout(x: Tensor, mask: Tensor, p: float) -> Tensor:
    """Return ``x`` with elements dropped and the rest scaled up; only the mask is kept for the backward pass.

    Args:
        x: floating point, any shape.
        mask: mask of the elements that stay, ``bool`` of ``x``'s shape, as returned by `random_mask`.
        p: probability with which the mask was drawn; kept elements are divided by one minus this probability, rounded
            as in `random_mask`.

    Returns:
        A tensor like ``x``, also under autocast.
    """
    # Keep the layout of x, which readers of the result may have been compiled for. Allocate only one tensor, since
    # allocating a second would take longer than filling it.
    result = torch.empty_like(x)
    return torch.where(mask, x, x.new_zeros(()), out=result).mul_(factor(p))


@masked_dropout.register_fake
def _(x: Tensor, mask: Tensor, p: float) -> Tensor:
    return torch.empty_like(x)


def _setup(ctx: Any, inputs: tuple[Tensor, Tensor, float], output: Tensor) -> None:
    _, mask, ctx.p = inputs
    ctx.save_for_backward(mask)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    (mask,) = ctx.saved_tensors
    return torch.ops.graftc.masked_dropout(grad, mask, ctx.p), None, None


masked_dropout.register_autograd(_backward, setup_context=_setup)

DECOMPOSITIONS: dict[Any, Callable[..., Tensor]] = {
    torch.ops.graftc.random_mask.default: random_mask_decomposed,
    torch.ops.graftc.masked_dropout.default: masked_dropout_decomposed,
}
"""ATen forms by operator: what exports write instead."""
