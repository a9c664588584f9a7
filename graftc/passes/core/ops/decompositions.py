"""The ``graftc::`` operators, for which ATen has no equivalent.

Each has an eager kernel, a fake kernel, a gradient, and a decomposition into ATen that exports use instead.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from graftc.passes.core.ops.dropout import DECOMPOSITIONS as DROPOUT
from graftc.passes.core.ops.gradients import DECOMPOSITIONS as GRADIENTS
from graftc.passes.core.ops.hard_concrete import DECOMPOSITIONS as GATED
from graftc.passes.core.ops.hashing import SEEDS, hashed
from graftc.passes.core.ops.magnitude import DECOMPOSITIONS as MAGNITUDE
from graftc.passes.core.ops.pruned import DECOMPOSITIONS as PRUNED
from graftc.passes.core.ops.sparse import DECOMPOSITIONS as SPARSE
from graftc.passes.core.ops.unpack import DECOMPOSITIONS as UNPACKED

__all__ = ["DECOMPOSITIONS", "SEEDS", "dropout_mask", "seeded_dropout", "seeded_dropout_decomposed"]

aten = torch.ops.aten


def dropout_mask(like: Tensor, seed: Tensor, p: float) -> Tensor:
    """Return the mask of elements that stay, ``bool`` of ``like``'s shape: a hash of their numbers, keyed by the seed.

    Args:
        like: tensor that determines the shape and device.
        seed: ``int64[1]``.
        p: probability of dropping an element.
    """
    number = torch.arange(like.numel(), device=like.device, dtype=torch.int32)
    kept: Tensor = (hashed(number, seed) >= min(int(p * 2**31), 2**31 - 1)).view(like.shape)
    return kept


def seeded_dropout_decomposed(x: Tensor, seed: Tensor, p: float) -> Tensor:
    """Compute `seeded_dropout` in ATen."""
    return x * dropout_mask(x, seed, p).to(x.dtype) * (1 / (1 - p))


@torch.library.custom_op("graftc::seeded_dropout", mutates_args=())
def seeded_dropout(x: Tensor, seed: Tensor, p: float) -> Tensor:
    """Apply dropout, keeping only its seed for the backward pass, where the mask is computed again.

    Args:
        x: floating point, any shape.
        seed: ``int64[1]``, drawn in the graph, so that each forward pass has its own and recomputation the same one.
        p: probability of dropping an element, in ``[0, 1)``.

    Returns:
        ``x`` with elements dropped and the rest scaled by ``1 / (1 - p)``.
    """
    return seeded_dropout_decomposed(x, seed, p)


@seeded_dropout.register_fake
def _(x: Tensor, seed: Tensor, p: float) -> Tensor:
    return torch.empty_like(x)


def _setup(ctx: Any, inputs: tuple[Tensor, Tensor, float], output: Tensor) -> None:
    _, seed, ctx.p = inputs
    ctx.save_for_backward(seed)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    (seed,) = ctx.saved_tensors
    return torch.ops.graftc.seeded_dropout(grad, seed, ctx.p), None, None


seeded_dropout.register_autograd(_backward, setup_context=_setup)

DECOMPOSITIONS: dict[Any, Callable[..., Tensor]] = {
    torch.ops.graftc.seeded_dropout.default: seeded_dropout_decomposed,
    **DROPOUT,
    **GATED,
    **GRADIENTS,
    **MAGNITUDE,
    **PRUNED,
    **SPARSE,
    **UNPACKED,
}
"""ATen forms by operator: what exports write instead."""
