"""The state of autograd in this thread, and the end of a backward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad


def is_transformed() -> bool:
    """Return whether a transform of `torch.func`, such as ``vmap``, is at work; torch says so nowhere else."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def has_forward_gradients() -> bool:
    """Return whether forward-mode gradients are computed; there is no public way to ask."""
    return forward_ad._current_level >= 0


def after_backward(function: Callable[[], None]) -> None:
    """Call a function when the backward pass that runs now is over; only the engine itself takes such functions."""
    torch.autograd.Variable._execution_engine.queue_callback(function)


def saved_tensor_hooks() -> tuple[Callable[[Tensor], Any], Callable[[Any], Any]] | None:
    """Return the innermost hooks of saved tensors in this thread, which torch lets code set but not read."""
    hooks: Any = torch._C._autograd._top_saved_tensors_default_hooks(False)
    return hooks  # type: ignore[no-any-return]
