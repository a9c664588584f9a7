"""The plain ATen form of `graftc.passes.core.ops.projections`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

Runs = tuple[tuple[int, int], ...]
"""Columns of a result, as half-open ranges; an empty tuple means all columns."""

Weights = Sequence[tuple[Tensor, Tensor | None, Tensor | None]]
"""Each map's weight, bias and scale."""


def product(x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool) -> Tensor:
    """Multiply with the operator that the base itself uses, so that equal weights give bitwise equal results.

    Args:
        x: ``[..., in]``; ``[n, in]`` with ``transposed``.
        weight: ``[out, in]``, or ``[in, out]`` with ``transposed``.
        bias: ``[out]``.
        transposed: whether the weight is stored as ``[in, out]``.
    """
    if not transposed:
        return nn.functional.linear(x, weight, bias)
    return torch.mm(x, weight) if bias is None else torch.addmm(bias, x, weight)


def plain_projections(
    x: Tensor,
    sources: Sequence[Tensor],
    weights: Weights,
    factors: Sequence[tuple[Tensor, Tensor, Tensor | None]],
    transposed: tuple[bool, ...],
    updates: tuple[tuple[int, int, float, Runs], ...],
    dropped: tuple[float | None, ...],
) -> tuple[Tensor, ...]:
    """Compute `projections` in ATen, one product at a time."""
    linear = nn.functional.linear
    drop = torch.ops.graftc.masked_dropout
    read = [x, *(z if p is None else drop(x, z, p) for z, p in zip(sources, dropped, strict=True))]
    results = [
        product(x, weight, bias, columns) for columns, (weight, bias, _) in zip(transposed, weights, strict=True)
    ]
    scaled = {number for number, (_, _, scale) in enumerate(weights) if scale is not None}
    for (of, source, scale, runs), (a, b, columns) in zip(updates, factors, strict=True):
        hidden = linear(read[source], a)
        delta = linear(hidden if scale == 1 else hidden * scale, b)
        scale_of = weights[of][2]
        if of in scaled and scale_of is not None:
            scaled.remove(of)
            results[of] = torch.ops.graftc.rescale(results[of], scale_of, delta, None, None, True)
        else:
            results[of] = _added(results[of], delta, columns, runs)
    for of in scaled:
        scale_of = weights[of][2]
        assert scale_of is not None
        results[of] = torch.ops.graftc.rescale(results[of], scale_of, None, None, None, True)
    return tuple(results)


def _added(result: Tensor, delta: Tensor, columns: Tensor | None, runs: Runs) -> Tensor:
    if columns is not None:
        return result.index_copy(-1, columns, result.index_select(-1, columns) + delta)
    parts: list[Tensor] = []
    at = taken = 0
    for start, end in runs:
        if start > at:
            parts.append(result[..., at:start])
        parts.append(result[..., start:end] + delta[..., taken : taken + end - start])
        at, taken = end, taken + end - start
    if at < result.shape[-1] and runs:
        parts.append(result[..., at:])
    return torch.cat(parts, -1) if runs else result + delta
