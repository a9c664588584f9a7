"""Combine the answers of several members: their weights, and the weighted mean of their logits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Return the fraction of rows whose largest logit belongs to the correct label, or 0 if there are no rows.

    Ties are decided in favour of the first logit.

    Args:
        logits: ``[rows, labels]``.
        labels: int64 ``[rows]``.
    """
    return float((logits.argmax(1) == labels).double().mean()) if len(labels) else 0.0


def member_weights(accuracies: Sequence[float] | None, members: int) -> Tensor:
    """Return the members' weights, float64 ``[members]``, which sum to one.

    In the paper (Schick & Schütze 2021), a member's weight is its pattern's accuracy on the training set before
    training.

    Args:
        accuracies: the members' accuracies before training; if they are None or all 0, the weights are equal.
        members: the number of members.

    Raises:
        ValueError: if the number of accuracies is not the number of members, or one is negative or not finite.
    """
    if accuracies is None:
        return torch.full((members,), 1.0 / members, dtype=torch.float64)
    weights = torch.tensor(list(accuracies), dtype=torch.float64)
    if weights.shape != (members,) or not bool((torch.isfinite(weights) & (weights >= 0)).all()):
        raise ValueError(f"{list(accuracies)} are not the accuracies of {members} members")
    total = weights.sum()
    return weights / total if total > 0 else member_weights(None, members)


def mixed_logits(logits: Tensor, weights: Tensor) -> Tensor:
    """Return the weighted mean of the members' logits, ``[rows, labels]`` in their dtype, accumulated in float64.

    Args:
        logits: ``[members, rows, labels]``.
        weights: ``[members]``; they need not sum to one.

    Raises:
        ValueError: if the number of weights is not the number of members, or their sum is not positive.
    """
    shares = weights.to(torch.float64)
    if shares.shape != logits.shape[:1] or not shares.sum() > 0:
        raise ValueError(f"weights {tuple(weights.shape)} for logits {tuple(logits.shape)}")
    mixed = torch.einsum("m,mrl->rl", shares / shares.sum(), logits.to(torch.float64))
    return mixed.to(logits.dtype)
