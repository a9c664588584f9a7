"""Operators on skew-symmetric matrices, from which rotations are computed: ``Q = -Q^T``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from graftc.passes.core.ops.declaring import like_first_by_rows, operator


def _places(size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return, for each entry of a matrix, its place in the upper triangle, and its sign, zero on the diagonal."""
    number = torch.arange(size, device=device)
    row, column = number[:, None], number[None, :]
    least, most = torch.minimum(row, column), torch.maximum(row, column)
    place = least * (2 * size - least - 1) // 2 + most - least - 1
    return place.clamp_min(0).flatten(), torch.sign(column - row)


def skew_decomposed(upper: Tensor, size: int) -> Tensor:
    """Compute `skew` in ATen."""
    place, sign = _places(size, upper.device)
    entries = upper.index_select(-1, place).view(*upper.shape[:-1], size, size)
    return entries * sign.to(upper.dtype)


def _skew_like(upper: Tensor, size: int) -> Tensor:
    return upper.new_empty((*upper.shape[:-1], size, size))


def _keep_size(ctx: Any, inputs: Sequence[Any], output: Tensor) -> None:
    ctx.size = inputs[1]


def _skew_gradient(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    row, column = torch.triu_indices(ctx.size, ctx.size, 1, device=grad.device)
    return (grad - grad.mT).flatten(-2).index_select(-1, row * ctx.size + column), None


@operator(_skew_like, plain=skew_decomposed, gradient=(_keep_size, _skew_gradient))
def skew(upper: Tensor, size: int) -> Tensor:
    """Return skew-symmetric matrices with the given entries above the diagonal.

    Args:
        upper: ``[..., size (size - 1) / 2]``: the entries above the diagonal, row by row.
        size: the number of rows.

    Returns:
        ``[..., size, size]``.
    """
    return skew_decomposed(upper, size)


def inverse_decomposed(skewed: Tensor) -> Tensor:
    """Compute `inverse_beside_one` in ATen, by elimination.

    No pivots are exchanged: the symmetric part of ``I + Q`` is ``I``, and each step of the elimination leaves one that
    is at least ``I``, so that no pivot is below 1.
    """
    size = skewed.shape[-1]
    one = torch.eye(size, dtype=skewed.dtype, device=skewed.device)
    rows = torch.cat([one + skewed, one.expand_as(skewed)], -1)
    for k in range(size):
        pivot = rows[..., k : k + 1, :] / rows[..., k : k + 1, k : k + 1]
        rows = rows - (rows[..., :, k : k + 1] - one[:, k : k + 1]) * pivot
    return rows[..., size:]


def _keep_inverse(ctx: Any, inputs: Sequence[Any], output: Tensor) -> None:
    ctx.save_for_backward(output)


def _inverse_gradient(ctx: Any, grad: Tensor) -> Tensor:
    inverse: Tensor = ctx.saved_tensors[0].mT
    return -(inverse @ grad @ inverse)


@operator(like_first_by_rows, plain=inverse_decomposed, gradient=(_keep_inverse, _inverse_gradient))
def inverse_beside_one(skewed: Tensor) -> Tensor:
    """Return ``(I + Q)^-1`` for skew-symmetric matrices ``Q``, for which it always exists.

    Args:
        skewed: ``[..., size, size]``, of at least 32 bits.

    Returns:
        A contiguous tensor like ``skewed``.
    """
    one = torch.eye(skewed.shape[-1], dtype=skewed.dtype, device=skewed.device)
    inverse: Tensor = torch.linalg.inv(one + skewed)
    return inverse.contiguous()
