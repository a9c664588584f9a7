"""Compute linear maps of one input, together with their low-rank updates, in one step.

In plain ATen, every map and every update allocates a tensor of the result's size (in the backward pass, of the input's
size), which is added to a sum and discarded. Here, the product that computes an update adds it to the result in place,
and the contributions of maps and updates to the input's gradient are accumulated in one tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from graftc.compat.autograd import has_forward_gradients, is_transformed
from graftc.compat.fake_tensors import FakeTensor
from graftc.passes.core.ops.autocasting import autocast_dtype, cast, without_autocast
from graftc.passes.core.ops.magnitude import nonzero
from graftc.passes.core.ops.masked_products import masked_product
from graftc.passes.core.ops.plain_projections import Runs, Weights, plain_projections, product
from graftc.passes.core.ops.projection_gradients import Backward
from graftc.passes.core.ops.projection_plan import (
    Given,
    LowRankUpdate,
    Plan,
    apart,
    flat,
    plan_of,
    rows,
    stacked,
)


def projections(
    x: Tensor,
    sources: Sequence[Tensor],
    weights: Weights,
    factors: Sequence[tuple[Tensor, Tensor, Tensor | None]],
    transposed: tuple[bool, ...],
    updates: tuple[tuple[int, int, float, Runs], ...],
    dropped: tuple[float | None, ...],
) -> tuple[Tensor, ...]:
    """Compute ``y_i = W_i x + b_i``, plus ``scale * B A z`` for each update of ``y_i``.

    ``z`` is ``x`` or another source. Gradients are those of the plain products, and are themselves differentiable.
    Under autocast, everything is computed in autocast's dtype, as products are. If anything except autograd observes
    the computation (`torch.compile`, `torch.func`, forward-mode gradients, tensor subclasses), plain products are used.

    Args:
        x: ``[..., in]``.
        sources: other inputs of updates, of ``x``'s shape; or ``bool`` masks of the elements of ``x`` that dropout
            keeps.
        weights: for each map, its weight, ``[out, in]`` or ``[in, out]``, its bias, ``[out]``, and a row scale,
            ``[out]``, by which the weight and the bias are multiplied. The detached scale is also a factor of ``B``,
            and the scale's gradient accounts for both uses; as in `graftc::rescale`, a scale of zero counts as `TINY`.
        factors: for each update, ``A: [rank, in]``, ``B: [rows, rank]`` and, if ``B``'s rows correspond neither to all
            columns of the result nor to runs of columns, the indices of the corresponding columns, ``int64[rows]``.
        transposed: for each of ``weights``, whether it is ``[in, out]``.
        updates: a `LowRankUpdate` for each of ``factors``.
        dropped: for each of ``sources`` that is a mask, the dropout probability with which it was drawn; otherwise
            None.

    Returns:
        ``[..., out]`` for each map.
    """
    tensors = flat(sources, weights, factors)
    if _watched([x, *tensors]):
        return plain_projections(x, sources, weights, factors, transposed, updates, dropped)
    plan = plan_of(transposed, updates, dropped)
    dtype = autocast_dtype(x)
    if dtype is not None:
        x, *others = (cast(t, dtype) for t in (x, *sources))
        tensors[: len(others)] = others
    results: tuple[Tensor, ...] = _Projections.apply(plan, dtype, x, *tensors)  # type: ignore[no-untyped-call]
    return results[: len(transposed)]


def _watched(tensors: Sequence[Tensor | None]) -> bool:
    """Return whether anything except autograd observes the computation, which an autograd function would hide."""
    return (
        torch.compiler.is_compiling()
        or is_transformed()
        or has_forward_gradients()
        or any(t is not None and type(t) not in _PLAIN for t in tensors)
    )


_PLAIN = (Tensor, nn.Parameter, FakeTensor)


class _Projections(torch.autograd.Function):
    """The autograd function of `projections`.

    Its results also include ``A z`` for the updates of each source, ``[rows, ranks]``: as results, they can be saved
    for the backward pass, and receive gradients there.
    """

    @staticmethod
    def forward(ctx: Any, plan: Plan, dtype: torch.dtype | None, x: Tensor, *others: Tensor | None) -> Any:
        given = Given.of(plan, x, others)
        with without_autocast(x, dtype):
            hidden = [
                _narrowed(plan, given, source, stacked(numbers, given, dtype).t()) if numbers else None
                for source, numbers in enumerate(plan.of)
            ]
            narrow = apart(plan, hidden, [a.shape[0] for a, _, _ in given.factors])
            outputs = []
            for number, (by_columns, weights) in enumerate(zip(plan.transposed, given.weights, strict=True)):
                output = _mapped(x, by_columns, weights[0], weights[1], dtype)
                if weights[2] is not None:
                    output.mul_(nonzero(weights[2]))
                for n in plan.at[number]:  # while the result is in the cache
                    part, (_, b, columns) = narrow[n], given.factors[n]
                    assert part is not None
                    _add_to(output, part, cast(b, dtype), columns, plan.updates[n])
                outputs.append(output)
        ctx.plan, ctx.dtype, ctx.shape = plan, dtype, x.shape
        ctx.ranks = [a.shape[0] for a, _, _ in given.factors]
        needs = Given.of(plan, ctx.needs_input_grad[2], ctx.needs_input_grad[3:])
        kept = _kept(plan, given, needs)
        ctx.given = len(kept)
        kept += [output if wants[2] else None for output, wants in zip(outputs, needs.weights, strict=True)]
        up = any(wants[1] for wants in needs.factors)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*kept, *(h if up else None for h in hidden))
        return (*outputs, *hidden)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        some = next((grad for grad in grads if grad is not None), None)
        if some is None:
            return (None,) * len(ctx.needs_input_grad)
        with without_autocast(some, ctx.dtype):
            return None, None, *Backward(ctx, grads).gradients()


def _mapped(x: Tensor, transposed: bool, weight: Tensor, bias: Tensor | None, dtype: torch.dtype | None) -> Tensor:
    own = x if transposed else x.contiguous()
    result = product(own, cast(weight, dtype), None if bias is None else cast(bias, dtype), transposed)
    # ``linear`` returns a view, and autograd forbids to write into views that a function with several results returns.
    return result.data


def _narrowed(plan: Plan, given: Given, source: int, down: Tensor) -> Tensor:
    """Return ``z @ down`` for a source: ``[rows, ranks]``."""
    own = rows(given.sources[source])
    return masked_product(rows(given.sources[0]), own, down) if plan.masked[source] else own @ down


def _add_to(output: Tensor, hidden: Tensor, b: Tensor, columns: Tensor | None, update: LowRankUpdate) -> None:
    """Add an update in place to the columns of a result that it changes."""
    flat = output.view(-1, output.shape[-1])
    if columns is not None:
        flat.index_add_(1, columns, hidden @ b.t(), alpha=update.scale)
        return
    at = 0
    for start, end in update.runs or ((0, flat.shape[-1]),):
        flat[:, start:end].addmm_(hidden, b[at : at + end - start].t(), alpha=update.scale)
        at += end - start


def _kept(plan: Plan, given: Given, needs: Given) -> list[Tensor | None]:
    """Return the tensors on which the requested gradients depend, each input once, in the order for `Given.of`.

    Weights are saved as they are stored: under autocast, casting them again costs less than keeping the casts.
    """
    first = [any(needs.factors[n][0] for n in numbers) for numbers in plan.of]
    read = [a or (plan.masked[s] and needs.sources[0]) for s, a in enumerate(first)]
    read[0] = any(a for s, a in enumerate(first) if plan.read(s) == 0) or any(wants[0] for wants in needs.weights)
    kept: list[Tensor | None] = [source if wanted else None for source, wanted in zip(given.sources, read, strict=True)]
    for weight, _, scale in given.weights:
        kept += [weight if needs.sources[0] else None, None, scale]
    for update, (a, b, columns), wants in zip(plan.updates, given.factors, needs.factors, strict=True):
        below = needs.sources[plan.read(update.source)]
        kept += [a if below else None, b if below or wants[0] else None, columns]
    return kept
