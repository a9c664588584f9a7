"""Dropout that saves, for the backward pass, either one byte per element or only a seed.

In the first variant, `random_mask` draws the mask and `masked_dropout` applies it. The latter is a pure function, so
that the same entries can be dropped from any number of tensors.
"""

from __future__ import annotations

import torch
from torch import Tensor

from graftc.passes.core.ops.declaring import its_own_gradient, like_first, operator
from graftc.passes.core.ops.hashing import hashed

LEVELS = 2**16
"""Dropout probabilities are rounded to multiples of one over this number."""

_PART = 2**15
"""Number of elements drawn at a time: few enough for their random numbers to stay in the cache."""

_SHARED = 4
"""Number of elements that share one 64-bit random number, 16 bits each."""


def level(p: float) -> int:
    """Return how many of the `LEVELS` random values drop an element: the share ``p``, rounded, but never all."""
    return min(round(p * LEVELS), LEVELS - 1)


def factor(p: float) -> float:
    """Return the factor for kept elements, derived from the rounded probability so that the expectation is exact."""
    return LEVELS / (LEVELS - level(p))


def random_mask_decomposed(like: Tensor, p: float) -> Tensor:
    """Compute `random_mask` in ATen, with different samples from the same distribution."""
    return torch.rand_like(like, dtype=torch.float32) >= level(p) / LEVELS


def _mask_like(like: Tensor, p: float) -> Tensor:
    return like.new_empty(like.shape, dtype=torch.bool)


@operator(_mask_like, plain=random_mask_decomposed, tags=[torch.Tag.nondeterministic_seeded])
def random_mask(like: Tensor, p: float) -> Tensor:
    """Draw a mask of the elements to keep from torch's generator for the device.

    Args:
        like: tensor that determines the shape and device.
        p: probability of dropping an element, in ``[0, 1)``; rounded to a multiple of ``1 / 65536`` below one.

    Returns:
        A contiguous ``bool`` tensor of ``like``'s shape.
    """
    if like.device.type != "cpu":
        return torch.empty(like.shape, dtype=torch.bool, device=like.device).bernoulli_(1 - level(p) / LEVELS)
    # Drawing 64 bits for four elements and comparing 16 bits for each takes a fifth of the time of `bernoulli_`.
    count, least = like.numel(), level(p) - LEVELS // 2
    mask = torch.empty(count, dtype=torch.bool)
    drawn = torch.empty(-(-min(count, _PART) // _SHARED), dtype=torch.int64)
    for start in range(0, count, _PART):
        part = mask[start : start + _PART]
        numbers = drawn.random_(-(2**63), None).view(torch.int16)
        torch.ge(numbers[: part.numel()], least, out=part)
    return mask.view(like.shape)


def masked_dropout_decomposed(x: Tensor, mask: Tensor, p: float) -> Tensor:
    """Compute `masked_dropout` in ATen."""
    return torch.where(mask, x, 0.0) * factor(p)


@operator(
    like_first,
    plain=masked_dropout_decomposed,
    gradient=its_own_gradient("masked_dropout"),
    tags=[torch.Tag.pointwise],
)
def masked_dropout(x: Tensor, mask: Tensor, p: float) -> Tensor:
    """Return ``x`` with elements dropped and the rest scaled up; only the mask is saved for the backward pass.

    Args:
        x: floating point, any shape.
        mask: mask of the elements to keep, ``bool`` of ``x``'s shape, as returned by `random_mask`.
        p: dropout probability with which the mask was drawn; kept elements are divided by one minus this probability,
            rounded as in `random_mask`.

    Returns:
        A tensor like ``x``, even under autocast.
    """
    # Keep the layout of x, for which readers of the result may have been compiled. Allocate only one tensor, since
    # allocating a second would take longer than filling it.
    result = torch.empty_like(x)
    return torch.where(mask, x, x.new_zeros(()), out=result).mul_(factor(p))


def dropout_mask(like: Tensor, seed: Tensor, p: float) -> Tensor:
    """Return a mask of the elements to keep, ``bool`` of ``like``'s shape: a hash of their indices, keyed by the seed.

    Args:
        like: tensor that determines the shape and device.
        seed: ``int64[1]``.
        p: probability of dropping an element.
    """
    number = torch.arange(like.numel(), device=like.device, dtype=torch.int32)
    return torch.ge(hashed(number, seed), min(int(p * 2**31), 2**31 - 1)).view(like.shape)


def seeded_dropout_decomposed(x: Tensor, seed: Tensor, p: float) -> Tensor:
    """Compute `seeded_dropout` in ATen."""
    return x * dropout_mask(x, seed, p).to(x.dtype) * (1 / (1 - p))


@operator(like_first, plain=seeded_dropout_decomposed, gradient=its_own_gradient("seeded_dropout"))
def seeded_dropout(x: Tensor, seed: Tensor, p: float) -> Tensor:
    """Apply dropout, saving only its seed for the backward pass, where the mask is recomputed.

    Args:
        x: floating point, any shape.
        seed: ``int64[1]``, drawn in the graph, so that each forward pass has its own seed and recomputation reuses it.
        p: probability of dropping an element, in ``[0, 1)``.

    Returns:
        ``x`` with elements dropped and the rest scaled by ``1 / (1 - p)``.
    """
    return seeded_dropout_decomposed(x, seed, p)
