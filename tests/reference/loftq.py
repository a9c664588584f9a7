"""LoftQ by its paper (Li et al. 2023, arXiv:2310.08659, Algorithm 1), with NF4 by search instead of bisection."""

from __future__ import annotations

import torch
from torch import Tensor

from graftc.passes.core.packing.blockwise import NF4


def nf4(weight: Tensor, block: int = 64) -> Tensor:
    """Return the values of a weight after rounding to NF4; its entries are a multiple of the block."""
    table = torch.tensor(NF4)
    rows = weight.float().reshape(-1, block)
    scale = rows.abs().amax(1, keepdim=True)
    nearest = (rows / scale).unsqueeze(-1).sub(table).abs().argmin(-1)
    return (table[nearest] * scale).reshape(weight.shape)


def loftq(weight: Tensor, rank: int, iterations: int) -> tuple[Tensor, Tensor]:
    """Return the quantised values and the update of the last iteration, both ``[out, in]``."""
    update = torch.zeros_like(weight)
    for _ in range(iterations):
        quantised = nf4(weight - update)
        u, s, v = torch.linalg.svd(weight - quantised, full_matrices=False)
        update = (u[:, :rank] * s[:rank]) @ v[:rank]
    return quantised, update
