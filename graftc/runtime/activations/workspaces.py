"""The workspace memory of graftc's operators, which runs on tensors without memory do not show."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from graftc.passes.core.ops.head_loss import chunk_rows, vocabulary_of

_DEVICE: ContextVar[str | None] = ContextVar("device", default=None)


@contextmanager
def running_on(device: str) -> Iterator[None]:
    """Compute workspaces for a device type while the block runs, whatever device the tensors without memory are on."""
    token = _DEVICE.set(device)
    try:
        yield
    finally:
        _DEVICE.reset(token)


def _of_head_loss(xs: Sequence[Tensor], weights: Sequence[Tensor], *rest: Any) -> int:
    """Return the workspace of one chunk of rows, in bytes."""
    labels, cap = rest[1], rest[8]
    dtype = weights[0].dtype
    wide = torch.promote_types(dtype, torch.float32)
    vocabulary = vocabulary_of(weights, rest[3])
    row = wide.itemsize * (1 if cap is None else 2) + (0 if dtype == wide else dtype.itemsize)
    device = _DEVICE.get() or labels.device.type
    return min(len(labels), chunk_rows(vocabulary, dtype, device)) * vocabulary * row


WORKSPACES: Mapping[Any, Callable[..., int]] = {torch.ops.graftc.head_loss_forward.default: _of_head_loss}
"""Functions that compute an operator's workspace in bytes from its arguments."""
