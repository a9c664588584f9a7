"""Declare an operator: its kernel, and everything else that torch needs to know about it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Function = Callable[..., Any]
Gradient = tuple[Function, Function]
"""``setup_context(ctx, inputs, output)``, which saves tensors for the backward pass, and ``backward(ctx, grad)``, as in
`torch.library.register_autograd`."""

DECOMPOSITIONS: dict[Any, Function] = {}
"""ATen equivalents by operator, which exports use instead."""


def operator(
    fake: Function, *, plain: Function | None = None, gradient: Gradient | None = None, tags: Sequence[torch.Tag] = ()
) -> Function:
    """Return a decorator that declares a kernel as the operator ``graftc::NAME``, where ``NAME`` is the kernel's name.

    Args:
        fake: the fake kernel, which returns tensors like the kernel's, but without values.
        plain: the ATen equivalent of the kernel; without it, the operator cannot appear in exported graphs.
        gradient: the gradient; None for an operator that is not differentiable.
        tags: the operator's tags.
    """

    def declared(kernel: Function) -> Any:
        own = torch.library.custom_op(f"graftc::{kernel.__name__}", kernel, mutates_args=(), tags=tags)
        own.register_fake(fake)
        if gradient is not None:
            setup_context, backward = gradient
            own.register_autograd(backward, setup_context=setup_context)
        if plain is not None:
            DECOMPOSITIONS[getattr(torch.ops.graftc, kernel.__name__).default] = plain
        return own

    return declared


def like_first(x: Tensor, *_: Any) -> Tensor:
    """Return a tensor like an operator's first argument, but without values."""
    return torch.empty_like(x)


def like_first_by_rows(x: Tensor, *_: Any) -> Tensor:
    """Return a contiguous tensor without values that has the shape and dtype of an operator's first argument."""
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def its_own_gradient(name: str) -> Gradient:
    """Return the gradient of an operator that multiplies its first argument by a symmetric matrix.

    The gradient is the operator itself, with the same other arguments: tensors first, then numbers.
    """

    def setup(ctx: Any, inputs: Sequence[Any], output: Tensor) -> None:
        ctx.save_for_backward(*(value for value in inputs[1:] if isinstance(value, Tensor)))
        ctx.numbers = [value for value in inputs[1:] if not isinstance(value, Tensor)]

    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        others = (*ctx.saved_tensors, *ctx.numbers)
        return getattr(torch.ops.graftc, name)(grad, *others), *(None for _ in others)

    return setup, backward
