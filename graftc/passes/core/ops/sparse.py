"""Operators for training only some entries of a weight: ``W' = W + scatter(indices, delta)``.

Only ``delta`` is a parameter, so an optimiser, including its decay and momentum, cannot affect any other entry.
`sparse_linear` saves its input for the backward pass and recomputes ``W'`` there; `sparse_weight` returns ``W'`` for
all other readers of a tensor. Indices refer to the stored tensor in row-major order.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from graftc.compat.tensors import is_view
from graftc.passes.core.ops.declaring import like_first_by_rows, operator
from graftc.passes.core.ops.plain_projections import product

aten = torch.ops.aten

SAMPLED_BELOW = 1 / 16
"""Share of entries below which computing their gradients one by one costs less than computing the whole weight's
gradient. On a CPU, both take the same time at about an eighth (weights of 2048 by 768, 512 tokens), so below this
share, computing them one by one saves time as well as memory."""


# torch warns once about each such layout, but graftc's users did not choose one.
warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta state")


def written(weight: Tensor, indices: Tensor, delta: Tensor) -> Tensor:
    """Return ``W'`` in the dtype of ``weight``, contiguous, with each entry rounded once."""
    result = weight.clone(memory_format=torch.contiguous_format)
    flat, places = result.view(-1), indices.long()
    if weight.dtype == delta.dtype:
        flat.put_(places, delta, accumulate=True)
        return result
    values = (flat.index_select(0, indices).to(delta.dtype) + delta).to(weight.dtype)
    if torch.are_deterministic_algorithms_enabled():
        flat.scatter_(0, places, values)
    else:  # takes half the time on a CPU; the result is the same, since indices have no duplicates
        flat.put_(places, values)
    return result


def sparse_weight_decomposed(weight: Tensor, indices: Tensor, delta: Tensor) -> Tensor:
    """Compute `sparse_weight` in ATen."""
    flat, places = weight.reshape(-1), indices.long()
    wide = torch.promote_types(weight.dtype, delta.dtype)
    values = (flat.gather(0, places).to(wide) + delta.to(wide)).to(weight.dtype)
    return flat.scatter(0, places, values).reshape(weight.shape)


def _weight_setup(ctx: Any, inputs: Sequence[Any], output: Tensor) -> None:
    _, indices, delta = inputs
    ctx.dtype = delta.dtype
    ctx.save_for_backward(indices)


def _weight_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, Tensor | None]:
    (indices,) = ctx.saved_tensors
    needs = ctx.needs_input_grad
    own = grad.reshape(-1).index_select(0, indices).to(ctx.dtype) if needs[2] else None
    return grad if needs[0] else None, None, own


@operator(like_first_by_rows, plain=sparse_weight_decomposed, gradient=(_weight_setup, _weight_backward))
def sparse_weight(weight: Tensor, indices: Tensor, delta: Tensor) -> Tensor:
    """Return ``weight`` with ``delta`` added at some of its entries.

    The gradient of ``delta`` is the result's gradient at these entries; the gradient of ``weight`` is the result's
    gradient, and is returned only if it is needed.

    Args:
        weight: any shape, in row-major order.
        indices: ``int32[k]`` or ``int64[k]``, without duplicates.
        delta: ``[k]``, in a dtype at least as wide.

    Returns:
        A new tensor like ``weight``.
    """
    return written(weight, indices, delta)


def sparse_linear_decomposed(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    indices: Sequence[Tensor],
    deltas: Sequence[Tensor],
    transposed: bool,
    sampled: bool,
) -> Tensor:
    """Compute `sparse_linear` in ATen."""
    for places, delta in zip(indices, deltas, strict=True):
        weight = sparse_weight_decomposed(weight, places, delta)
    return product(x, weight, bias, transposed)


def _linear_like(
    x: Tensor, weight: Tensor, bias: Tensor | None, indices: Any, deltas: Any, transposed: bool, *_: Any
) -> Tensor:
    return product(x, weight, bias, transposed)


def _linear_setup(ctx: Any, inputs: Sequence[Any], output: Tensor) -> None:
    x, weight, bias, indices, deltas, ctx.transposed, ctx.sampled = inputs
    ctx.count, ctx.bias = len(indices), None if bias is None else bias.dtype
    ctx.save_for_backward(x, weight, *indices, *deltas)


def _linear_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, weight, *rest = ctx.saved_tensors
    indices, deltas = rest[: ctx.count], rest[ctx.count :]
    need_x, need_weight, need_bias, _, need_deltas, *_ = ctx.needs_input_grad
    transposed, grad_x = ctx.transposed, None
    delta_grads: list[Tensor | None] = [None] * ctx.count
    if need_x:
        changed = weight
        for places, delta in zip(indices, deltas, strict=True):
            changed = torch.ops.graftc.sparse_weight(changed, places, delta)
        changed = changed.to(grad.dtype)
        grad_x = (grad @ (changed.mT if transposed else changed)).to(x.dtype)
        del changed
    rows, columns = x.reshape(-1, x.shape[-1]).to(grad.dtype), grad.reshape(-1, grad.shape[-1])
    left, right = (rows, columns) if transposed else (columns, rows)
    weight_grad = None
    wanted = need_deltas if isinstance(need_deltas, list | tuple) else [need_deltas] * ctx.count
    sampled = ctx.sampled and grad.dtype in (torch.float32, torch.float64) and not need_weight
    for number, (places, delta) in enumerate(zip(indices, deltas, strict=True)):
        if not wanted[number]:
            continue
        if sampled:
            delta_grads[number] = torch.ops.graftc.sampled_product(left, right, places).to(delta.dtype)
            continue
        weight_grad = left.mT @ right if weight_grad is None else weight_grad
        delta_grads[number] = weight_grad.reshape(-1).index_select(0, places).to(delta.dtype)
    if need_weight:
        weight_grad = (left.mT @ right if weight_grad is None else weight_grad).to(weight.dtype)
    grad_bias = columns.sum(0).to(ctx.bias) if need_bias else None
    return grad_x, weight_grad if need_weight else None, grad_bias, [None] * ctx.count, delta_grads, None, None


@operator(_linear_like, plain=sparse_linear_decomposed, gradient=(_linear_setup, _linear_backward))
def sparse_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    indices: Sequence[Tensor],
    deltas: Sequence[Tensor],
    transposed: bool,
    sampled: bool,
) -> Tensor:
    """Apply a linear map with ``W'``: ``weight`` with each of ``deltas`` added at its ``indices``, in order.

    ``W'`` is recomputed in the backward pass. The gradient of the full weight exists only while the gradients of
    entries are read from it, and not at all with ``sampled``.

    Args:
        x: ``[..., in]``; ``[n, in]`` with ``transposed``.
        weight: ``[out, in]``, or ``[in, out]`` with ``transposed``.
        bias: ``[out]``.
        indices: for each change, the indices of entries in the stored weight, ``int32[k]`` or ``int64[k]``.
        deltas: for each change, ``[k]``, in a dtype at least as wide as the weight's.
        transposed: whether the weight is stored as ``[in, out]``.
        sampled: whether to compute the gradients of entries one by one, which requires indices in ascending order;
            ignored if the result's gradient is neither float32 nor float64, or if the weight's own gradient is needed.

    Returns:
        ``[..., out]``, in autocast's dtype if autocast is enabled.
    """
    for places, delta in zip(indices, deltas, strict=True):
        weight = written(weight, places, delta)
    return product(x, weight, bias, transposed)


def _sampled_like(left: Tensor, right: Tensor, indices: Tensor) -> Tensor:
    return left.new_empty(indices.shape)


@operator(_sampled_like)
def sampled_product(left: Tensor, right: Tensor, indices: Tensor) -> Tensor:
    """Compute only some entries of ``left.mT @ right``.

    Args:
        left: ``[n, rows]``, float32 or float64.
        right: ``[n, columns]``.
        indices: ``[k]`` in ascending order, ``row * columns + column``.

    Returns:
        ``[k]``.
    """
    rows, columns = left.shape[-1], right.shape[-1]
    edges = torch.arange(rows + 1, device=indices.device, dtype=indices.dtype) * columns
    starts = torch.searchsorted(indices, edges, out_int32=indices.dtype == torch.int32)
    pattern = torch.sparse_csr_tensor(
        starts, indices % columns, left.new_zeros(indices.shape), (rows, columns), check_invariants=False
    )
    product = torch.sparse.sampled_addmm(pattern, left.mT, right, beta=0.0)
    values: Tensor = product.values()
    return values.clone() if is_view(values) else values
