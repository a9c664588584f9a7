"""Pruned weights: a weight with zeros wherever its scores are small, without a stored mask.

Two values per group of entries determine which entries stay: a *threshold* that scores must exceed and, since equal
scores are common (zeros, 16 bits), the position of the *last* entry that stays among those equal to the threshold. Thus
exactly the requested number of entries stays, and both passes compute the same mask from scores that are available
anyway.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from graftc.passes.core.ops.declaring import like_first, operator

Edge = tuple[Tensor, Tensor]
"""A threshold and the position of the last entry that stays, for one group or several."""


def dropped(scores: Tensor, threshold: Tensor, last: Tensor) -> Tensor:
    """Return a mask of the entries to drop, ``bool`` of the shape of ``scores``. NaN is kept, so that it is noticed.

    Args:
        scores: at least two axes; groups are equal parts along the leading axes.
        threshold: ``[groups]``.
        last: ``int64[groups]``, counted from 0 within each group; -1 if none of the equal entries stay.
    """
    own = scores.reshape(threshold.shape[0], -1, scores.shape[-1])
    edge, end = threshold.view(-1, 1, 1), last.view(-1, 1, 1) + 1
    # Rows and columns are compared separately: indices of all entries would take eight times the memory of the mask.
    width = own.shape[-1]
    row = torch.arange(own.shape[1], device=own.device).view(-1, 1)
    column = torch.arange(width, device=own.device)
    full = torch.div(end, width, rounding_mode="floor")
    within = (row < full) | ((row == full) & (column < end - full * width))
    return ((own < edge) | ((own == edge) & ~within)).view(scores.shape)


def pruned_weight_decomposed(weight: Tensor, scores: Tensor | None, threshold: Tensor, last: Tensor) -> Tensor:
    """Compute `pruned_weight` in ATen."""
    used = weight.abs() if scores is None else scores
    return weight.masked_fill(dropped(used.to(threshold.dtype), threshold, last), 0)


def _setup(ctx: Any, inputs: Sequence[Any], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
    weight, scores, threshold, last = ctx.saved_tensors
    needs = ctx.needs_input_grad
    own = straight = None
    if needs[0]:
        own = grad.masked_fill(dropped(weight.abs() if scores is None else scores, threshold, last), 0)
    if scores is not None and needs[1]:
        straight = grad.to(scores.dtype) * weight
    return own, straight, None, None


@operator(like_first, plain=pruned_weight_decomposed, gradient=(_setup, _backward))
def pruned_weight(weight: Tensor, scores: Tensor | None, threshold: Tensor, last: Tensor) -> Tensor:
    """Return ``weight`` with zeros where `dropped` is true.

    The gradient of the weight is the result's gradient where entries stay, and zero elsewhere. The gradient of the
    scores is a straight-through estimate: the result's gradient times the weight, for all entries. The mask is
    recomputed in the backward pass.

    Args:
        weight: floating point, at least two axes.
        scores: of the same shape; None for the weight's magnitudes, which are then treated as constants.
        threshold: ``[groups]``, in a dtype that can represent every score.
        last: ``int64[groups]``.

    Returns:
        A new tensor like ``weight``.
    """
    return weight.clone().masked_fill_(dropped(weight.abs() if scores is None else scores, threshold, last), 0)


def edge_of(scores: Sequence[Tensor], kept: int) -> list[Edge]:
    """Return the edges that keep exactly ``kept`` of all entries, those with the largest scores.

    Among equal scores, the first ones are kept.

    Args:
        scores: the scores of each group, ``[n]``; NaN counts as smaller than any other value.
        kept: number of entries to keep, from 1 to their total number.

    Returns:
        For each group, the threshold, which is the same for all groups, and the last position, both scalars on the
        scores' device.
    """
    ordered = [s.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf) for s in scores]
    every = ordered[0] if len(ordered) == 1 else torch.cat(ordered)
    if kept == every.numel():
        return [(s.new_full((), -torch.inf), _number(s.numel() - 1, s)) for s in ordered]
    threshold = every.kthvalue(every.numel() - kept + 1).values
    left = kept - (every > threshold).sum()
    del every
    edges: list[Edge] = []
    for own in ordered:
        equal = (own == threshold).cumsum(0)
        last = (equal < left).sum()  # where the count reaches ``left``, computed without waiting for the device
        edges.append((threshold, torch.where(left > 0, last, _number(-1, own))))
        left = left - equal[-1]
    return edges


def _number(value: int, like: Tensor) -> Tensor:
    return torch.tensor(value, dtype=torch.int64, device=like.device)
