"""Settings of `torch.compile` and `torch.export` that only `torch._dynamo` has; it is imported when one is used."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch


def without_call_cache() -> AbstractContextManager[None]:
    """Return a context manager in which the modes that torch.export creates keep no results of calls on fake tensors.

    No argument of torch.export says so.
    """
    settings: AbstractContextManager[None] = torch._dynamo.config.patch(fake_tensor_cache_enabled=False)
    return settings


def failing_on_recompiles() -> AbstractContextManager[None]:
    """Return a context manager in which compiling code a second time is an error.

    The public stance ``fail_on_recompile`` raises another error.
    """
    settings: AbstractContextManager[None] = torch._dynamo.config.patch(error_on_recompile=True)
    return settings
