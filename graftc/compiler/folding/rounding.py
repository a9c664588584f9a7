"""Rounding folded tensors to the type that is deployed, in pieces that stay in the processor's cache."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from graftc.compiler.folding.retention import Retention
from graftc.passes.core.weights import folds

PIECE = 2**18
"""Elements that are rounded and checked at a time."""

NARROW = (torch.bfloat16, torch.float16)
"""Types of 16 bits, which may round a small update away. What is in one can be widened, to float32."""


def round_pieces(into: Tensor, exact: Tensor) -> None:
    """Round a float64 tensor once into a contiguous one of the same shape, to its type."""
    for to, own in pieces(into, exact):
        to.copy_(folds.round_once(own, to.dtype))


def round_into(into: Tensor, exact: Tensor, base: Tensor) -> tuple[float, Retention]:
    """The same, with what it does.

    Args:
        into, exact: as for `round_pieces`.
        base: what was folded, of the same shape.

    Returns:
        The largest error in units in the last place, and how much of the update is left.
    """
    return _rounding(into, exact, base, writes=True)


def rounding_of(stored: Tensor, exact: Tensor, base: Tensor) -> tuple[float, Retention]:
    """What `round_into` returns, of a tensor that somebody else has rounded."""
    return _rounding(stored, exact, base, writes=False)


def _rounding(into: Tensor, exact: Tensor, base: Tensor, *, writes: bool) -> tuple[float, Retention]:
    worst, left = 0.0, Retention()
    # The same memory for every piece: what is made anew for each is not in the cache.
    spare = torch.empty(2, min(PIECE, into.numel()), dtype=torch.float64, device=into.device)
    for to, own, before in pieces(into, exact, base):
        if writes:
            to.copy_(folds.round_once(own, to.dtype))
        error, other = (part[: own.numel()].view(own.shape) for part in spare)
        error.copy_(to).sub_(own)
        worst = largest(worst, _in_last_place(error, own, to.dtype, other))
        left += Retention.of_error(before, own, error, other)
    return worst, left


def retained(base: Tensor, exact: Tensor, rounded: Tensor) -> Retention:
    """How much of an update is left, of tensors of any size and layout."""
    left = Retention()
    for parts in pieces(base, exact, rounded):
        left += Retention.of(*parts)
    return left


def units_in_last_place(found: Tensor, exact: Tensor) -> float:
    """Largest ``|found - exact|`` in units in the last place of ``found``'s dtype, at the exact value."""
    error = found.to(torch.float64, copy=True).sub_(exact)
    return _in_last_place(error, exact, found.dtype, torch.empty_like(error))


def _in_last_place(error: Tensor, exact: Tensor, dtype: torch.dtype, spare: Tensor) -> float:
    info = torch.finfo(dtype)
    power = power_below(exact, dtype, spare)
    least, most = (float(end) for end in torch.aminmax(torch.div(error, power, out=power)))
    return largest(-least, most) / info.eps


def power_below(values: Tensor, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """The power of two at or below each absolute value, by whose size units in the last place of ``dtype`` go: at least
    its least normal number, below which units stay as they are.

    Args:
        values: float64.
        dtype: a floating type.
        out: where it goes, of the shape and type of ``values``.
    """
    power = torch.empty_like(values) if out is None else out
    # A float64 of which the exponent is left is that power.
    torch.bitwise_and(values.view(torch.int64), 0x7FF0000000000000, out=power.view(torch.int64))
    return power.clamp_min_(torch.finfo(dtype).tiny)


def furthest(a: Tensor, b: Tensor) -> float:
    """The largest absolute difference; NaN where there is one, 0 where there are no elements."""
    return float((a - b).abs().max()) if a.numel() else 0.0


def largest(*values: float) -> float:
    """The largest number; NaN where there is one, which Python's ``max`` may pass over."""
    return math.nan if any(map(math.isnan, values)) else max(values)


def pieces(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Tensors of one shape in parts of at most `PIECE` elements, however they are laid out."""
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
