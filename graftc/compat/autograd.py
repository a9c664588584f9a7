"""Queries of this thread's autograd state, and callbacks at the end of a backward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad


def is_transformed() -> bool:
    """Return whether a `torch.func` transform, such as ``vmap``, is active; torch has no public way to ask."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def has_forward_gradients() -> bool:
    """Return whether forward-mode gradients are computed; there is no public way to ask."""
    return forward_ad._current_level >= 0


def after_backward(function: Callable[[], None]) -> None:
    """Call a function at the end of the current backward pass; only the engine itself accepts such callbacks."""
    torch.autograd.Variable._execution_engine.queue_callback(function)


def saved_tensor_hooks() -> tuple[Callable[[Tensor], Any], Callable[[Any], Any]] | None:
    """Return the innermost saved-tensor hooks in this thread, which torch lets code set but not read."""
    hooks: Any = torch._C._autograd._top_saved_tensors_default_hooks(False)
    return hooks  # type: ignore[no-any-return]
