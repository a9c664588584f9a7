"""The casts that autocast applies to the operands of matrix products, for functions that perform them explicitly."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """Return the dtype in which autocast currently computes products; None if it is disabled."""
    kind = x.device.type
    enabled = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if enabled else None


def cast(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Cast a tensor as autocast does, which leaves float64 unchanged."""
    if dtype is None or tensor.dtype == dtype or tensor.dtype == torch.float64 or not tensor.is_floating_point():
        return tensor
    return tensor.to(dtype)


def without_autocast(x: Tensor, dtype: torch.dtype | None) -> AbstractContextManager[Any]:
    """Return a context that disables autocast for explicitly cast tensors; it does nothing if there is no dtype."""
    return nullcontext() if dtype is None else torch.autocast(x.device.type, enabled=False)
