"""Copies of buffers, so that running a model's Python never changes the source's tensors."""

from __future__ import annotations

import copy
from collections.abc import Collection

import torch
from torch import Tensor, nn

from graftc.compiler.resolve.untie import sharing_copy


def copies(tensors: Collection[Tensor]) -> list[Tensor]:
    """Copies of tensors; those that share memory share that of their copies."""
    with torch.inference_mode(False):
        return copy.deepcopy([tensor.detach() for tensor in tensors])


def version(tensor: Tensor) -> int:
    """How often a tensor has been written to; 0 where torch does not count."""
    return 0 if tensor.is_inference() else tensor._version


def with_own_buffers(model: nn.Module) -> nn.Module:
    """A copy of a model with buffers of its own, and the source's storage for parameters."""
    buffers = list(model.buffers())
    own: nn.Module = sharing_copy(model, dict(zip(map(id, buffers), copies(buffers), strict=True)))
    return own
