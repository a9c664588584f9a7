"""The loss with which a classifier learns from soft labels."""

from __future__ import annotations

import torch
from torch import Tensor


def distillation_loss(student: Tensor, teacher: Tensor, temperature: float = 2.0) -> Tensor:
    """Return ``KL(softmax(teacher / T) || softmax(student / T)) T² / batch``, a scalar; 0 for equal logits.

    The factor keeps gradients on the same scale as at ``T = 1`` (Hinton et al. 2015).

    Args:
        student: logits ``[batch, labels]`` that receive gradients.
        teacher: logits ``[batch, labels]`` that receive no gradients.
        temperature: ``T``, positive.

    Raises:
        ValueError: if the shapes differ or are not two-dimensional, or the temperature is not positive.
    """
    if student.shape != teacher.shape or student.ndim != 2:
        raise ValueError(f"logits have the shapes {tuple(student.shape)} and {tuple(teacher.shape)}")
    if not temperature > 0:
        raise ValueError(f"the temperature must be positive, got {temperature}")
    said = torch.log_softmax(student / temperature, dim=1)
    wanted = torch.log_softmax(teacher.detach().to(student.dtype) / temperature, dim=1)
    divergence = (wanted.exp() * (wanted - said)).sum()
    return divergence * temperature**2 / student.shape[0]
