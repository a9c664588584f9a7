"""Settings of `torch.compile` and `torch.export` that only `torch._dynamo` offers; it is imported on first use."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch


def without_call_cache() -> AbstractContextManager[None]:
    """Return a context manager in which torch.export's modes do not cache results of calls on fake tensors.

    torch.export has no argument for this.
    """
    settings: AbstractContextManager[None] = torch._dynamo.config.patch(fake_tensor_cache_enabled=False)
    return settings


def failing_on_recompiles() -> AbstractContextManager[None]:
    """Return a context manager in which recompiling code is an error.

    The public stance ``fail_on_recompile`` raises a different error.
    """
    settings: AbstractContextManager[None] = torch._dynamo.config.patch(error_on_recompile=True)
    return settings
