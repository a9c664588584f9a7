"""The operator that computes the values of a packed weight from its stored parts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from graftc.passes.core.ops.declaring import DECOMPOSITIONS, operator
from graftc.passes.core.packing import affine, blockwise, floating, half_quadratic, ordered, row_scaled
from graftc.passes.core.packing.gradients import tapped
from graftc.passes.core.packing.packing import packing_of, swapped

FAMILIES = (affine, blockwise, floating, half_quadratic, ordered, row_scaled)
"""Modules that define packings; importing them registers their kinds."""


def unpack_decomposed(
    parts: Sequence[Tensor], packing: str, shape: Sequence[int], dtype: torch.dtype, alone: bool = True
) -> Tensor:
    """Compute `unpack` or `unpacked` in ATen."""
    return packing_of(packing).values(parts, shape, dtype)


def _values_like(parts: Sequence[Tensor], packing: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    if packing_of(packing).transposed:
        return parts[0].new_empty(swapped(shape), dtype=dtype).transpose(-1, -2)
    return parts[0].new_empty(shape, dtype=dtype)


@operator(_values_like, plain=unpack_decomposed)
def unpack(parts: Sequence[Tensor], packing: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return the values of a packed weight. They have no gradient: codes are not trained.

    Args:
        parts: the stored tensors, ``uint8``, in the order of the packing's parts.
        packing: the text form of the packing; see `graftc.passes.core.packing.packing.Packing.text`.
        shape: the weight's shape.
        dtype: dtype of its values.
    """
    return packing_of(packing).values(parts, shape, dtype, traced=False)


UNPACK = torch.ops.graftc.unpack.default


def unpacked(
    parts: Sequence[Tensor], packing: str, shape: Sequence[int], dtype: torch.dtype, alone: bool = True
) -> Tensor:
    """Call `unpack` from a running graph.

    When `torch.compile` traces a training step, the call is marked for recomputation in the backward pass, since the
    values would otherwise be saved for it.

    Args:
        parts, packing, shape, dtype: as for `unpack`.
        alone: whether this is the only read of the weight, so that any requested gradient comes from this read alone.
    """
    if torch.compiler.is_compiling() and not torch.compiler.is_exporting() and torch.is_grad_enabled():
        return cast("Tensor", checkpoint(_unpack_tensors, packing, shape, dtype, *parts, use_reentrant=False))
    return tapped(UNPACK(parts, packing, shape, dtype), parts[0], alone)


def _unpack_tensors(packing: str, shape: Sequence[int], dtype: torch.dtype, *parts: Tensor) -> Tensor:
    return cast("Tensor", UNPACK(parts, packing, shape, dtype))


DECOMPOSITIONS[unpacked] = unpack_decomposed
