"""How far outputs move when folded weights are rounded otherwise: what 16 bits leave of a comparison of outputs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from graftc.compiler.folding.differences import largest_difference

__all__ = ["rounding_noise"]

TIMES = 2
"""How many other roundings are tried."""


def rounding_noise(weights: Iterable[Tensor], run: Callable[[], Sequence[object]], outputs: Sequence[object]) -> float:
    """The largest difference of outputs over a few runs in which weights are rounded to neighbours of their values.

    Every entry is multiplied by ``1 + r``, with ``r`` drawn from ``[-eps / 2, eps / 2]`` by a fixed seed, and rounded
    to its type. Weights have their own values again afterwards, whatever happens.

    Args:
        weights: in 16 bits; written to, one after the other.
        run: gives the outputs of the model that has them.
        outputs: those with the weights as they are.
    """
    held = [weight.detach() for weight in weights]
    kept = [weight.clone() for weight in held]
    worst = 0.0
    try:
        for seed in range(TIMES):
            generator = torch.Generator().manual_seed(seed)
            for weight, own in zip(held, kept, strict=True):
                drawn = torch.rand(own.shape, generator=generator).sub_(0.5).mul_(torch.finfo(own.dtype).eps).add_(1)
                weight.copy_(own.float().mul_(drawn.to(own.device)))
            for a, b in zip(run(), outputs, strict=True):
                if isinstance(a, Tensor) and isinstance(b, Tensor) and a.is_floating_point():
                    worst = max(worst, largest_difference(a, b))
    finally:
        for weight, own in zip(held, kept, strict=True):
            weight.copy_(own)
    return worst
