"""The gradients of `graftc.passes.core.ops.projections`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from graftc.passes.core.ops.autocasting import cast
from graftc.passes.core.ops.magnitude import column_sums, nonzero
from graftc.passes.core.ops.masked_products import add_masked_product, masked, product_of_masked
from graftc.passes.core.ops.projection_plan import Given, LowRankUpdate, Plan, apart, joined, rows, stacked


class Backward:
    """Computes the gradients of one call to `projections`.

    Sums are accumulated in place, but only in products that autograd has not saved, so that all gradients are
    themselves differentiable.
    """

    def __init__(self, ctx: Any, grads: Sequence[Tensor | None]) -> None:
        self._plan: Plan = ctx.plan
        self._dtype: torch.dtype | None = ctx.dtype
        self._shape: torch.Size = ctx.shape
        self._ranks: list[int] = ctx.ranks
        saved = ctx.saved_tensors
        self._given = Given.of(self._plan, saved[0], saved[1 : ctx.given])
        self._needs = Given.of(self._plan, ctx.needs_input_grad[2], ctx.needs_input_grad[3:])
        count = len(self._plan.transposed)
        self._results = [None if grad is None else rows(grad) for grad in grads[:count]]
        self._of_hidden = grads[count:]
        self._outputs = saved[ctx.given : ctx.given + count]
        self._hidden = apart(self._plan, saved[ctx.given + count :], self._ranks)
        self._first = [any(self._needs.factors[n][0] for n in numbers) for numbers in self._plan.of]
        self._second = [self._needs.sources[self._plan.read(s)] for s in range(self._plan.sources)]
        self._below = [a or b for a, b in zip(self._first, self._second, strict=True)]
        self._sums: list[Tensor | None] = [None] * self._plan.sources
        self._narrow: list[Tensor | None] = [None] * len(self._plan.updates)
        self._factors: list[list[Tensor | None]] = [[None] * 3 for _ in self._plan.updates]

    def gradients(self) -> list[Tensor | None]:
        """Return the gradients of the input and of all tensors that `flat` lists, in its order."""
        weights = [grad for number in range(len(self._plan.transposed)) for grad in self._of_map(number)]
        for source, below in enumerate(self._below):
            if below and self._plan.of[source]:
                self._of_source(source)
        sums = [None if total is None else total.view(self._shape) for total in self._sums]
        return [*sums, *weights, *(grad for three in self._factors for grad in three)]

    def _add(self, source: int, a: Tensor, b: Tensor) -> None:
        total = self._sums[source]
        self._sums[source] = a @ b if total is None else total.addmm_(a, b)

    def _add_masked(self, source: int, a: Tensor, b: Tensor) -> None:
        mask = rows(self._given.sources[source])
        if self._sums[0] is not None and not torch.is_grad_enabled():
            add_masked_product(self._sums[0], mask, a, b)
            return
        product = masked(a @ b, mask)
        self._sums[0] = product if self._sums[0] is None else self._sums[0] + product

    def _down(self, source: int, grad: Tensor) -> Tensor:
        """Return the gradient of the first factors of a source's updates, given the gradient of ``A z``."""
        own = rows(self._given.sources[source])
        if not self._plan.masked[source]:
            return grad.t() @ own
        x = rows(self._given.sources[0])
        return grad.t() @ masked(x, own) if torch.is_grad_enabled() else product_of_masked(grad, x, own)

    def _of_map(self, number: int) -> list[Tensor | None]:
        """Return the gradients of a map's weight, bias and scale, and compute the gradients of its updates.

        The map's contribution is added to the gradient of the input.
        """
        grad, transposed = self._results[number], self._plan.transposed[number]
        if grad is None:
            return [None, None, None]
        for update in self._plan.at[number]:
            self._of_update(update, grad)
        weight, _, scale = self._given.weights[number]
        scale_grad = None
        if scale is not None:
            used = nonzero(scale)
            if self._needs.weights[number][2]:
                scale_grad = column_sums(grad, rows(self._outputs[number]), scale)[0] / used
            grad = (grad * used).to(grad.dtype)
        if self._needs.sources[0]:
            weight = cast(weight, self._dtype)
            self._add(0, grad, weight.t() if transposed else weight)
        weight_grad = None
        if self._needs.weights[number][0]:
            x = rows(self._given.sources[0])
            weight_grad = x.t() @ grad if transposed else grad.t() @ x
        return [weight_grad, grad.sum(0) if self._needs.weights[number][1] else None, scale_grad]

    def _of_update(self, number: int, grad: Tensor) -> None:
        """Compute the gradients of an update's second factor and of ``A z``, ``[rows, rank]``."""
        update, (_, b, columns) = self._plan.updates[number], self._given.factors[number]
        own = _own(grad, columns, update)
        if self._second[update.source] or self._needs.factors[number][0]:
            self._narrow[number] = (own @ cast(b, self._dtype)) * update.scale
        if self._needs.factors[number][1]:
            hidden = self._hidden[number]
            assert hidden is not None
            # Twice as fast on a CPU with the wide side last.
            self._factors[number][1] = ((hidden * update.scale).t() @ own).t()

    def _of_source(self, source: int) -> None:
        """Compute the gradients of the first factors of a source's updates.

        The updates' contribution is added to the gradient of the source.
        """
        numbers, grad = self._plan.of[source], self._of_hidden[source]
        has_own = grad is not None
        sizes = [self._ranks[number] for number in numbers]
        parts = [self._narrow[number] for number in numbers]
        like = next((part for part in parts if part is not None), None)
        if like is not None:
            zeros = like.new_zeros
            every = [zeros(len(like), n) if p is None else p for p, n in zip(parts, sizes, strict=True)]
            grad = joined(every, 1) if grad is None else grad + joined(every, 1)
        if grad is None:
            return
        if self._second[source]:
            down = stacked(numbers, self._given, self._dtype)
            (self._add_masked if self._plan.masked[source] else self._add)(source, grad, down)
        if self._first[source]:
            grads = self._down(source, grad)
            for number, part in zip(numbers, torch.split(grads, sizes), strict=True):
                if self._needs.factors[number][0] and (self._narrow[number] is not None or has_own):
                    self._factors[number][0] = part


def _own(grad: Tensor, columns: Tensor | None, update: LowRankUpdate) -> Tensor:
    """Return the columns of a result's gradient that correspond to an update: ``[rows, out]``."""
    if columns is not None:
        return grad.index_select(1, columns)
    if not update.runs:
        return grad
    return joined([grad[:, start:end] for start, end in update.runs], 1)
