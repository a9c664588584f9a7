"""Round folded tensors to the deployed dtype, in pieces that stay in the processor's cache."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from graftc.compiler.folding.retention import power_below, retention_of, retention_of_error
from graftc.passes.core.weights import folds
from graftc.records.retention import Retention

PIECE = 2**16
"""Number of elements that are rounded and checked at a time."""

NARROW = (torch.bfloat16, torch.float16)
"""The 16-bit dtypes, which may round a small update away; values in them can be widened to float32."""


def rounded_differently(weight: Tensor, generator: torch.Generator) -> Tensor:
    """Return a weight of which every entry is multiplied by ``1 + r``, with ``r`` in ``[-eps / 2, eps / 2]``.

    Args:
        weight: a floating-point tensor, which stays as it is.
        generator: draws ``r``, on the CPU.

    Returns:
        The products, in the weight's dtype.
    """
    wide = torch.float32 if weight.dtype in NARROW else torch.float64
    factors = torch.rand(weight.shape, generator=generator, dtype=wide).sub_(0.5)
    factors.mul_(torch.finfo(weight.dtype).eps).add_(1)
    return factors.to(weight.device).mul_(weight.detach()).to(weight.dtype)


def round_pieces(into: Tensor, exact: Tensor) -> None:
    """Round a float64 tensor once into a contiguous tensor of the same shape, to the latter's dtype."""
    for to, own in pieces(into, exact):
        to.copy_(folds.round_once(own, to.dtype))


def round_into(into: Tensor, exact: Tensor, base: Tensor, *, writes: bool = True) -> tuple[float, Retention]:
    """Round like `round_pieces`, and measure the effect.

    Args:
        into, exact: as for `round_pieces`.
        base: the tensor before the fold, with the same shape.
        writes: whether to round; if false, ``into`` already contains rounded values.

    Returns:
        The largest error in units in the last place, and how much of the update is left.
    """
    worst, left = 0.0, Retention()
    # Reuse the same memory for every piece: newly allocated memory would not be in the cache.
    spare = torch.empty(2, min(PIECE, into.numel()), dtype=torch.float64, device=into.device)
    for to, own, before in pieces(into, exact, base):
        error, other = (part[: own.numel()].view(own.shape) for part in spare)
        if writes:
            to.copy_(_shortened(own, to.dtype, error, other))
        units = _in_last_place(error.copy_(to).sub_(own), own, to.dtype, other)
        if writes and to.dtype in NARROW and not units < 0.5:
            doubtful = (other.abs_() < torch.finfo(to.dtype).eps / 2).logical_not_().nonzero(as_tuple=True)
            to[doubtful] = folds.round_once(own[doubtful], to.dtype)
            units = _in_last_place(error.copy_(to).sub_(own), own, to.dtype, other)
        worst = largest(worst, units)
        left += retention_of_error(before, own, error, to.dtype, other, look=left.is_noise)
    return worst, left


def retained(base: Tensor, exact: Tensor, rounded: Tensor) -> Retention:
    """Return how much of an update is left, for tensors with any size and layout."""
    left = Retention()
    for parts in pieces(base, exact, rounded):
        left += retention_of(*parts)
    return left


def _shortened(exact: Tensor, dtype: torch.dtype, out: Tensor, spare: Tensor) -> Tensor:
    """Return float64 values with no more significant bits than a 16-bit dtype has, rounded once; others unchanged.

    torch converts float64 to 16 bits by way of float32, which rounds twice, but nothing is lost from these values. Only
    ties, and values outside the dtype's normal range, may still be rounded differently.

    Dekker, "A floating-point technique for extending the available precision", Numerische Mathematik 18, 1971.
    """
    if dtype not in NARROW:
        return exact
    factor = 2.0**52 * torch.finfo(dtype).eps + 1  # 53 bits, minus those of the dtype
    torch.mul(exact, factor, out=out)
    torch.sub(out, exact, out=spare)
    return out.sub_(spare)


def _in_last_place(error: Tensor, exact: Tensor, dtype: torch.dtype, spare: Tensor) -> float:
    """Return the largest error in units in the last place, and store all errors, times ``eps``, in ``spare``."""
    info = torch.finfo(dtype)
    power = power_below(exact, dtype, spare)
    least, most = (float(end) for end in torch.aminmax(torch.div(error, power, out=power)))
    return largest(-least, most) / info.eps


def largest_change(before: Tensor, after: Tensor) -> float:
    """Return the largest absolute change of stored values, in float64; NaN if any is NaN, 0 for empty tensors."""
    return largest(0.0, *(furthest(a.double(), b.double()) for a, b in pieces(before, after)))


def furthest(a: Tensor, b: Tensor) -> float:
    """Return the largest absolute difference; NaN if any difference is NaN, 0 for empty tensors."""
    return size(a - b)


def size(values: Tensor) -> float:
    """Return the largest absolute value; NaN if any value is NaN, 0 for an empty tensor."""
    return float(values.abs().max()) if values.numel() else 0.0


def largest(*values: float) -> float:
    """Return the largest value; NaN if any value is NaN, which Python's ``max`` may ignore."""
    return math.nan if any(map(math.isnan, values)) else max(values)


def pieces(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yield tensors with the same shape in parts of at most `PIECE` elements, whatever their layout."""
    first = tensors[0]
    if not first.numel():
        return
    if not first.dim():
        yield tuple(tensor.reshape(1) for tensor in tensors)
        return
    count = PIECE // first[0].numel()
    if count:
        yield from zip(*(torch.split(tensor, count) for tensor in tensors), strict=True)
        return
    for parts in zip(*tensors, strict=True):
        yield from pieces(*parts)
