"""An operator that adds gated differences to a weight: ``W' = W + z z_group w`` (hard concrete, arXiv:1712.01312).

A gate is ``z = clip(sigmoid(log(u / (1 - u)) + alpha) (high - low) + low, 0, 1)`` with uniform ``u``, or the same
without the noise term. The noise is a hash of an entry's index, keyed by a seed, so that only the parameters and the
seed are saved for the backward pass. Everything is computed in chunks, to keep intermediate tensors small.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from graftc.passes.core.ops.declaring import like_first_by_rows, operator
from graftc.passes.core.ops.hashing import hashed, wrapped

EDGE = 1e-4
"""Minimum distance of the noise from 0 and from 1."""

_BITS = 23
"""Number of bits of noise. A value is the midpoint of one of ``2**_BITS`` equal intervals, exact in float32."""

_PART, _LARGE_PART = 2**16, 2**24
"""Number of entries computed at a time, on a CPU (few enough to stay in the cache) and on other devices."""

_GROUP = -1
"""The index that keys the group's noise; entries are indexed from 0."""


def noise(count: int, seed: Tensor, dtype: torch.dtype, start: int = 0) -> Tensor:
    """Return ``log(u / (1 - u))`` for entries ``start`` to ``start + count``.

    ``u`` is uniform in ``(EDGE, 1 - EDGE)``.

    Args:
        count: number of entries.
        seed: ``int64[1]``; determines the device.
        dtype: dtype of the computation and of the result.
        start: index of the first entry. Indices that are equal modulo ``2**32`` have the same noise.
    """
    numbers = torch.arange(count, device=seed.device, dtype=torch.int32) + wrapped(start)
    bits = hashed(numbers, seed) & (2**_BITS - 1)
    uniform: Tensor = bits.to(dtype).add_(0.5).mul_((1 - 2 * EDGE) / 2**_BITS).add_(EDGE)
    return uniform.logit_()


def _unclipped(alpha: Tensor, seed: Tensor | None, low: float, high: float, start: int = 0) -> Tensor:
    """Return the gate values before clipping: a new tensor of ``alpha``'s shape."""
    noisy = alpha if seed is None else alpha + noise(alpha.numel(), seed, alpha.dtype, start).view(alpha.shape)
    return noisy.sigmoid().mul_(high - low).add_(low)


def _slope(raw: Tensor, low: float, high: float) -> Tensor:
    """Return the derivative of gates with respect to alpha, given their unclipped values ``raw``; zero where clipped.

    It is ``(high - low) s (1 - s)``, where ``s`` is the sigmoid.
    """
    return ((raw - low) * (high - raw) / (high - low)).masked_fill_((raw <= 0) | (raw >= 1), 0)


def gated_weight_decomposed(
    weight: Tensor, w: Tensor, alpha: Tensor, group: Tensor | None, seed: Tensor | None, low: float, high: float
) -> Tensor:
    """Compute `gated_weight` in ATen."""
    delta = _unclipped(alpha, seed, low, high).clamp(0, 1) * w
    if group is not None:
        delta = delta * _unclipped(group, seed, low, high, _GROUP).clamp(0, 1)
    return (weight.to(w.dtype) + delta).to(weight.dtype)


def _parts(size: int, device: torch.device) -> Iterator[slice]:
    step = _PART if device.type == "cpu" else _LARGE_PART
    return (slice(start, start + step) for start in range(0, size, step))


def _gradients_like(
    grad: Tensor, w: Tensor, alpha: Tensor, group: Tensor | None, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return like_first_by_rows(w), like_first_by_rows(alpha), w.new_empty(1 if group is not None else 0)


@operator(_gradients_like)
def gated_gradients(
    grad: Tensor, w: Tensor, alpha: Tensor, group: Tensor | None, seed: Tensor | None, low: float, high: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of ``w``, ``alpha`` and ``group``, given the gradient of `gated_weight`'s result.

    Args:
        grad: gradient of the result, in the result's shape.
        w, alpha, group, seed, low, high: as for `gated_weight`.

    Returns:
        ``g z z_group``, ``g w z_group dz/dalpha`` and the sum of ``g w z dz_group/dgroup``, each like the corresponding
        tensor; the last is empty without a group. The derivative of a clipped gate is zero.
    """
    grad_w = torch.empty_like(w, memory_format=torch.contiguous_format)
    grad_alpha = torch.empty_like(alpha, memory_format=torch.contiguous_format)
    into_w, into_alpha = grad_w.view(-1), grad_alpha.view(-1)
    coming, differences, places = grad.reshape(-1), w.reshape(-1), alpha.reshape(-1)
    raw_outer = None if group is None else _unclipped(group, seed, low, high, _GROUP)
    outer = None if raw_outer is None else raw_outer.clamp(0, 1)
    total = w.new_zeros(1 if group is not None else 0)
    for part in _parts(w.numel(), w.device):
        raw = _unclipped(places[part], seed, low, high, part.start)
        own = coming[part].to(w.dtype)
        slope = _slope(raw, low, high).mul_(own).mul_(differences[part])
        own = own * raw.clamp_(0, 1)
        if outer is not None:
            total += torch.dot(own, differences[part])
            own.mul_(outer)
            slope.mul_(outer)
        into_w[part] = own
        into_alpha[part] = slope
    return grad_w, grad_alpha, total if raw_outer is None else total.mul_(_slope(raw_outer, low, high))


def _setup(ctx: Any, inputs: Sequence[Any], output: Tensor) -> None:
    _, w, alpha, group, seed, ctx.low, ctx.high = inputs
    ctx.save_for_backward(w, alpha, group, seed)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    w, alpha, group, seed = ctx.saved_tensors
    needs = ctx.needs_input_grad
    own: tuple[Tensor | None, ...] = (None, None, None)
    if any(needs[1:4]):
        grads = torch.ops.graftc.gated_gradients(grad, w, alpha, group, seed, ctx.low, ctx.high)
        own = tuple(value if need else None for value, need in zip(grads, needs[1:4], strict=True))
    return grad if needs[0] else None, *own, None, None, None


@operator(like_first_by_rows, plain=gated_weight_decomposed, gradient=(_setup, _backward))
def gated_weight(
    weight: Tensor, w: Tensor, alpha: Tensor, group: Tensor | None, seed: Tensor | None, low: float, high: float
) -> Tensor:
    """Return ``weight + z z_group w``, where ``alpha`` determines the gates ``z`` and ``group`` the gate ``z_group``.

    Args:
        weight: any shape.
        w: differences, of the weight's shape, in a dtype at least as wide; the computation uses this dtype.
        alpha: location parameters of the gates, like ``w``.
        group: ``[1]`` in the dtype of ``w``: the location parameter of an additional gate for all entries; None if
            there is no such gate.
        seed: ``int64[1]``, drawn in the graph, so that each forward pass has its own seed and recomputation reuses it;
            None for gates without noise.
        low: lower end of the range to which gates are stretched before clipping, below 0.
        high: upper end of that range, above 1.

    Returns:
        A contiguous tensor of the weight's shape and dtype, with each entry rounded once, even under autocast.
    """
    result = torch.empty_like(weight, memory_format=torch.contiguous_format)
    source, filled = weight.reshape(-1), result.view(-1)
    differences, places = w.reshape(-1), alpha.reshape(-1)
    outer = None if group is None else _unclipped(group, seed, low, high, _GROUP).clamp_(0, 1)
    for part in _parts(w.numel(), w.device):
        delta = _unclipped(places[part], seed, low, high, part.start).clamp_(0, 1).mul_(differences[part])
        if outer is not None:
            delta.mul_(outer)
        filled[part] = delta.add_(source[part])
    return result
