"""The declaration of an operator: its kernel, with everything else that torch has to know of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Function = Callable[..., Any]
Gradient = tuple[Function, Function]
"""What the backward pass keeps, ``setup_context(ctx, inputs, output)``, and the backward pass, ``backward(ctx, grad)``,
as `torch.library.register_autograd` takes them."""

DECOMPOSITIONS: dict[Any, Function] = {}
"""ATen forms by operator: what exports write instead."""


def operator(
    fake: Function, *, plain: Function | None = None, gradient: Gradient | None = None, tags: Sequence[torch.Tag] = ()
) -> Function:
    """Return a decorator that declares a kernel as the operator ``graftc::NAME``, where it is called ``NAME``.

    Args:
        fake: returns tensors without values like those that the kernel returns.
        plain: computes the same as the kernel in ATen; without it, the operator is in no exported graph.
        gradient: the gradient; None if there is none.
        tags: tags of the operator.
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
    """Return a tensor without values like the first argument of an operator."""
    return torch.empty_like(x)


def like_first_by_rows(x: Tensor, *_: Any) -> Tensor:
    """Return a tensor without values of the shape and type of the first argument of an operator, contiguous."""
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def its_own_gradient(name: str) -> Gradient:
    """Return the gradient of an operator that multiplies its first argument by a matrix that is symmetric.

    It is the operator itself, with the same other arguments: tensors, then numbers.
    """

    def setup(ctx: Any, inputs: Sequence[Any], output: Tensor) -> None:
        ctx.save_for_backward(*(value for value in inputs[1:] if isinstance(value, Tensor)))
        ctx.numbers = [value for value in inputs[1:] if not isinstance(value, Tensor)]

    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        others = (*ctx.saved_tensors, *ctx.numbers)
        return getattr(torch.ops.graftc, name)(grad, *others), *(None for _ in others)

    return setup, backward
