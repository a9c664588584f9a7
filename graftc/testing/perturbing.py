"""Fill tensors with random values, so that no error hides behind zeros, ones or symmetry."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from graftc.runtime.compiled import Compiled


@torch.no_grad()
def perturb(compiled: Compiled, scale: float = 0.05, seed: int = 0) -> dict[str, Tensor]:
    """Add normal noise to every trainable adapter tensor in place, as a substitute for training.

    Args:
        compiled: the adapted model.
        scale: standard deviation of the noise.
        seed: seed of the noise.

    Returns:
        The trainable tensors by name, detached, after the change.
    """
    generator = torch.Generator().manual_seed(seed)
    trained: dict[str, Tensor] = {}
    for name, tensor in compiled.named_parameters():
        if tensor.requires_grad:
            tensor.add_(torch.randn(tensor.shape, generator=generator).to(tensor) * scale)
            trained[name] = tensor.detach()
    return trained


@torch.no_grad()
def randomise(model: nn.Module, scale: float = 0.1, seed: int = 0) -> nn.Module:
    """Add normal noise to every vector of a model in place, so that no bias is zero and no norm's gain is one."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.dim() < 2:
            parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter) * scale)
    return model
