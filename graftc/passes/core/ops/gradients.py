"""Operators that mask the gradient of a trained tensor.

`grad_mask` returns a view of the tensor; the gradient that flows back through it is masked by `masked_gradient`. A mask
is a hash of the seed, the step and each element's index. It therefore need not be stored; it is the same for every
micro-batch of a step, when a layer is recomputed and on every device, and it changes with each step.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor

from graftc.passes.core.ops.declaring import DECOMPOSITIONS, its_own_gradient, like_first, operator
from graftc.passes.core.ops.hashing import avalanche, counted, halves, wrapped

_PART, _LARGE_PART = 2**16, 2**22
"""Number of elements masked at a time, on a CPU (few enough to stay in the cache) and on other devices."""


def _parts(tensor: Tensor, most: int, first: int = 0) -> Iterator[tuple[Tensor, int]]:
    """Yield views of at most ``most`` elements that cover a tensor, each with the index of its first element."""
    if tensor.numel() <= most:
        yield tensor, first
        return
    row = tensor[0].numel()
    rows = max(1, most // row)
    for start in range(0, tensor.shape[0], rows):
        block = tensor[start : start + rows] if row <= most else tensor[start]
        yield from _parts(block, most, first + start * row)


def _masked(grad: Tensor, step: Tensor, seed: Tensor, p: float) -> Tensor:
    low, high = halves(counted(seed, step))
    spread = 2 * high + 1
    most = _PART if grad.device.type == "cpu" else _LARGE_PART
    numbers = torch.arange(min(grad.numel(), most), device=grad.device, dtype=torch.int32) * spread
    least = 2**31 - max(1, round(p * 2**32))  # signed 32-bit values from here on keep an element
    result, zero = torch.empty_like(grad), grad.new_zeros(())
    for (part, first), (given, _) in zip(_parts(result, most), _parts(grad, most), strict=True):
        z = avalanche(numbers[: part.numel()] + (spread * wrapped(first) + low))
        # On a CPU this takes a third of the time of `masked_fill_`.
        torch.where((z >= least).view(part.shape), given, zero, out=part).mul_(1 / p)
    return result


_SETUP, _BACKWARD = its_own_gradient("masked_gradient")


@operator(like_first, gradient=(_SETUP, _BACKWARD))
def masked_gradient(grad: Tensor, step: Tensor, seed: Tensor, p: float) -> Tensor:
    """Return ``grad`` with some elements kept and divided by ``p``, and zeros elsewhere, even in place of NaN.

    Apart from the result, it allocates only a few values per element of a fixed-size chunk. The result is a new tensor,
    since autograd may have passed ``grad`` to other functions as well.

    Args:
        grad: floating point, any shape and layout. Elements are indexed in row-major order. Masks repeat after 2**32
            elements.
        step: ``int64[1]``.
        seed: ``int64[1]``.
        p: probability of keeping an element, in ``(0, 1]``.

    Returns:
        A tensor like ``grad``.
    """
    return _masked(grad, step, seed, p)


class _GradMask(torch.autograd.Function):
    """The autograd function of `grad_mask`: a view whose gradient is masked."""

    @staticmethod
    def forward(weight: Tensor, step: Tensor, seed: Tensor, p: float) -> Tensor:
        return weight.view_as(weight)

    setup_context = staticmethod(_SETUP)
    backward = staticmethod(_BACKWARD)


# An `operator` may not return a view of its input, but a composite operator may: tracers see the view that it consists
# of, and autograd sees the function above.
torch.library.define("graftc::grad_mask", "(Tensor(a) weight, Tensor step, Tensor seed, float p) -> Tensor(a)")


@torch.library.impl("graftc::grad_mask", "CompositeImplicitAutograd")
def grad_mask(weight: Tensor, step: Tensor, seed: Tensor, p: float) -> Tensor:
    """Return a view of ``weight`` whose gradient goes through `masked_gradient`.

    Args:
        weight: the trained tensor; any floating-point dtype and shape.
        step: ``int64[1]``, the number of optimiser steps. It must not change between the forward and the backward pass.
        seed: ``int64[1]``, used for this tensor only.
        p: probability of keeping an element's gradient, in ``(0, 1]``.
    """
    return cast("Tensor", _GradMask.apply(weight, step, seed, p))  # type: ignore[no-untyped-call, unused-ignore]


def grad_mask_decomposed(weight: Tensor, step: Tensor, seed: Tensor, p: float) -> Tensor:
    """Compute the value of `grad_mask` in ATen, for graphs that are not trained."""
    return weight.view_as(weight)


DECOMPOSITIONS[torch.ops.graftc.grad_mask.default] = grad_mask_decomposed
