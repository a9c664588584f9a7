"""What several members say together: weights, and the weighted mean of their logits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """The fraction of rows whose largest logit is the label's; of equal ones the first counts, 0 without rows.

    Args:
        logits: ``[rows, labels]``.
        labels: int64 ``[rows]``.
    """
    return float((logits.argmax(1) == labels).double().mean()) if len(labels) else 0.0


def member_weights(accuracies: Sequence[float] | None, members: int) -> Tensor:
    """Weights of members, float64 ``[members]``, which sum to one.

    In the paper (Schick & Schütze 2021) a member weighs what its pattern got right on the training set before it was
    trained.

    Args:
        accuracies: of the members before training; None weighs them equally, and so does nothing right at all.
        members: how many there are.

    Raises:
        ValueError: accuracies are not one for each member, or negative or not finite.
    """
    if accuracies is None:
        return torch.full((members,), 1.0 / members, dtype=torch.float64)
    weights = torch.tensor(list(accuracies), dtype=torch.float64)
    if weights.shape != (members,) or not bool((torch.isfinite(weights) & (weights >= 0)).all()):
        raise ValueError(f"{list(accuracies)} are not the accuracies of {members} members")
    total = weights.sum()
    return weights / total if total > 0 else member_weights(None, members)


def mixed_logits(logits: Tensor, weights: Tensor) -> Tensor:
    """The weighted mean of members' logits, ``[rows, labels]`` in their element type; summed in float64.

    Args:
        logits: ``[members, rows, labels]``.
        weights: ``[members]``; they need not sum to one.

    Raises:
        ValueError: the weights are not one for each member, or sum to zero.
    """
    shares = weights.to(torch.float64)
    if shares.shape != logits.shape[:1] or not shares.sum() > 0:
        raise ValueError(f"weights {tuple(weights.shape)} for logits {tuple(logits.shape)}")
    mixed = torch.einsum("m,mrl->rl", shares / shares.sum(), logits.to(torch.float64))
    return mixed.to(logits.dtype)
