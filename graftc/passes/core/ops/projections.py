"""Linear maps of one input, with low-rank updates, in one step.

In plain ATen every map of an input and every update of its result makes a tensor of the result's or of the input's size
that is added up and thrown away. Here updates are added in place to the results that they are for, in the product that
makes them, and what maps and updates say of the input's gradient is added up in one tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from graftc.passes.core.ops.autocasting import autocast_dtype, cast, without_autocast
from graftc.passes.core.ops.dropout import factor
from graftc.passes.core.ops.masked_products import add_masked_product, masked, masked_product, product_of_masked
from graftc.passes.core.ops.plain_projections import Runs, plain_projections

__all__ = ["Map", "Runs", "Update", "projections"]


class Map(NamedTuple):
    """How a weight is stored.

    Attributes:
        transposed: as ``[in, out]``, not ``[out, in]``.
    """

    transposed: bool


class Update(NamedTuple):
    """A product of two factors that is added to a result.

    Attributes:
        of: number of the map.
        source: number of what the first factor is applied to: 0 for the maps' input.
        scale: of the product.
        runs: columns of the result that it is for.
    """

    of: int
    source: int
    scale: float
    runs: Runs = ()


def projections(
    x: Tensor,
    sources: Sequence[Tensor],
    weights: Sequence[tuple[Tensor, Tensor | None]],
    factors: Sequence[tuple[Tensor, Tensor, Tensor | None]],
    maps: tuple[tuple[bool], ...],
    updates: tuple[tuple[int, int, float, Runs], ...],
    dropped: tuple[float | None, ...],
) -> tuple[Tensor, ...]:
    """``y_i = W_i x + b_i``, plus ``scale * B A z`` for each update of it, where ``z`` is ``x`` or another source.

    Gradients are those of the plain products, for everything that wants one, and have gradients themselves. Under
    autocast all is computed in its element type, as products are. Where something else than autograd looks at what is
    computed (`torch.compile`, `torch.func`, forward-mode gradients, tensor subclasses), plain products are taken.

    Args:
        x: ``[..., in]``.
        sources: other inputs of updates, of ``x``'s shape; or masks of what dropout leaves of ``x``, ``bool``.
        weights: of each map, ``[out, in]`` or ``[in, out]``, with its bias, ``[out]``.
        factors: of each update: ``A: [rank, in]``, ``B: [rows, rank]``, and where ``B``'s rows are not all columns of
            the result or runs of them, which they are, ``int64[rows]``.
        maps: a `Map` for each of ``weights``.
        updates: an `Update` for each of ``factors``.
        dropped: for each of ``sources`` that is a mask, the probability that it was drawn with; None for others.

    Returns:
        ``[..., out]`` for each map.
    """
    tensors = _flat(sources, weights, factors)
    if _watched([x, *tensors]):
        return plain_projections(x, sources, weights, factors, maps, updates, dropped)
    plan = _plan(maps, updates, dropped)
    dtype = autocast_dtype(x)
    if dtype is not None:
        x, *others = (cast(t, dtype) for t in (x, *sources))
        tensors[: len(others)] = others
    found: tuple[Tensor, ...] = _Projections.apply(plan, dtype, x, *tensors)  # type: ignore[no-untyped-call]
    return found[: len(maps)]


@dataclass(frozen=True)
class _Plan:
    """What is known of a call before it is made.

    Attributes:
        maps, updates: of the call; scales make up for what dropout takes.
        masked: for each source, the maps' input included, whether it is a mask of that.
        of: numbers of the updates of each source.
        at: numbers of the updates of each map.
    """

    maps: tuple[Map, ...]
    updates: tuple[Update, ...]
    masked: tuple[bool, ...]
    of: tuple[tuple[int, ...], ...]
    at: tuple[tuple[int, ...], ...]

    @property
    def sources(self) -> int:
        """How many there are."""
        return len(self.masked)

    def read(self, source: int) -> int:
        """The source that the gradient of one is for: a mask has none."""
        return 0 if self.masked[source] else source


@lru_cache(maxsize=1024)
def _plan(
    maps: tuple[tuple[bool], ...],
    updates: tuple[tuple[int, int, float, Runs], ...],
    dropped: tuple[float | None, ...],
) -> _Plan:
    given = (None, *dropped)
    factors = [1.0 if p is None else factor(p) for p in given]
    made = tuple(Update(of, source, scale * factors[source], runs) for of, source, scale, runs in updates)
    of = tuple(tuple(i for i, u in enumerate(made) if u.source == s) for s in range(len(given)))
    at = tuple(tuple(i for i, u in enumerate(made) if u.of == m) for m in range(len(maps)))
    return _Plan(tuple(Map(*one) for one in maps), made, tuple(p is not None for p in given), of, at)


def _flat(
    sources: Sequence[Tensor],
    weights: Sequence[tuple[Tensor, Tensor | None]],
    factors: Sequence[tuple[Tensor, Tensor, Tensor | None]],
) -> list[Tensor | None]:
    return [*sources, *(t for pair in weights for t in pair), *(t for three in factors for t in three)]


class _Given(NamedTuple):
    """What `_flat` has made flat."""

    sources: list[Any]
    weights: list[list[Any]]
    factors: list[list[Any]]

    @classmethod
    def of(cls, plan: _Plan, x: Any, flat: Sequence[Any]) -> _Given:
        start = plan.sources - 1
        middle = start + 2 * len(plan.maps)
        pairs = [list(flat[i : i + 2]) for i in range(start, middle, 2)]
        return cls([x, *flat[:start]], pairs, [list(flat[i : i + 3]) for i in range(middle, len(flat), 3)])


def _watched(tensors: Sequence[Tensor | None]) -> bool:
    """Whether something looks at what is computed that an autograd function would hide it from."""
    return (
        torch.compiler.is_compiling()
        or torch._C._functorch.maybe_current_level() is not None
        or forward_ad._current_level >= 0
        or any(t is not None and type(t) not in _PLAIN for t in tensors)
    )


_PLAIN = (Tensor, nn.Parameter)


class _Projections(torch.autograd.Function):
    """`projections`, whose results also are ``A z`` for the updates of each source, ``[rows, ranks]``: as results they
    can be kept for the backward pass and have gradients there.
    """

    @staticmethod
    def forward(ctx: Any, plan: _Plan, dtype: torch.dtype | None, x: Tensor, *flat: Tensor | None) -> Any:
        given = _Given.of(plan, x, flat)
        with without_autocast(x, dtype):
            hidden = [
                _narrowed(plan, given, source, _stacked(numbers, given, dtype).t()) if numbers else None
                for source, numbers in enumerate(plan.of)
            ]
            narrow = _apart(plan, hidden, [a.shape[0] for a, _, _ in given.factors])
            outputs = []
            for number, (one, weights) in enumerate(zip(plan.maps, given.weights, strict=True)):
                output = _mapped(x, one, weights[0], weights[1], dtype)
                for n in plan.at[number]:  # while the result is in the cache
                    part, (_, b, columns) = narrow[n], given.factors[n]
                    assert part is not None
                    _add_to(output, part, cast(b, dtype), columns, plan.updates[n])
                outputs.append(output)
        ctx.plan, ctx.dtype, ctx.shape = plan, dtype, x.shape
        ctx.ranks = [a.shape[0] for a, _, _ in given.factors]
        kept = _kept(plan, given, _Given.of(plan, ctx.needs_input_grad[2], ctx.needs_input_grad[3:]))
        up = any(wants[1] for wants in _Given.of(plan, ctx.needs_input_grad[2], ctx.needs_input_grad[3:]).factors)
        ctx.given = len(kept)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*kept, *(h if up else None for h in hidden))
        return (*outputs, *hidden)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        some = next((grad for grad in grads if grad is not None), None)
        if some is None:
            return (None,) * len(ctx.needs_input_grad)
        with without_autocast(some, ctx.dtype):
            return None, None, *_Backward(ctx, grads).gradients()


def _mapped(x: Tensor, one: Map, weight: Tensor, bias: Tensor | None, dtype: torch.dtype | None) -> Tensor:
    weight, bias = cast(weight, dtype), None if bias is None else cast(bias, dtype)
    if one.transposed:
        return x @ weight if bias is None else torch.addmm(bias, x, weight)
    return nn.functional.linear(x.contiguous(), weight, bias)


def _narrowed(plan: _Plan, given: _Given, source: int, down: Tensor) -> Tensor:
    """``z @ down`` for a source: ``[rows, ranks]``."""
    rows = _rows(given.sources[source])
    return masked_product(_rows(given.sources[0]), rows, down) if plan.masked[source] else rows @ down


def _stacked(numbers: Sequence[int], given: _Given, dtype: torch.dtype | None) -> Tensor:
    """First factors of some updates, ``[ranks, in]``."""
    return _joined([cast(given.factors[number][0], dtype) for number in numbers], 0)


def _apart(plan: _Plan, stacked: Sequence[Tensor | None], ranks: Sequence[int]) -> list[Tensor | None]:
    """What each update has of values that all updates of a source have side by side, ``[rows, rank]``."""
    found: list[Tensor | None] = [None] * len(ranks)
    for numbers, value in zip(plan.of, stacked, strict=True):
        if value is not None:
            parts = torch.split(value, [ranks[n] for n in numbers], 1) if len(numbers) > 1 else (value,)
            for number, part in zip(numbers, parts, strict=True):
                found[number] = part
    return found


def _joined(parts: Sequence[Tensor], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim)


def _rows(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, tensor.shape[-1])


def _add_to(output: Tensor, hidden: Tensor, b: Tensor, columns: Tensor | None, update: Update) -> None:
    """Add an update to its columns of a result, in place."""
    rows = output.view(-1, output.shape[-1])
    if columns is not None:
        rows.index_add_(1, columns, hidden @ b.t(), alpha=update.scale)
        return
    at = 0
    for start, end in update.runs or ((0, rows.shape[-1]),):
        rows[:, start:end].addmm_(hidden, b[at : at + end - start].t(), alpha=update.scale)
        at += end - start


def _kept(plan: _Plan, given: _Given, needs: _Given) -> list[Tensor | None]:
    """What gradients that are wanted are made of, as `_given` reads it; each input once. Weights stay as they are
    stored: under autocast they are cast again, which is less than keeping them."""
    first = [any(needs.factors[n][0] for n in numbers) for numbers in plan.of]
    read = [a or (plan.masked[s] and needs.sources[0]) for s, a in enumerate(first)]
    read[0] = any(a for s, a in enumerate(first) if plan.read(s) == 0) or any(wants[0] for wants in needs.weights)
    kept: list[Tensor | None] = [source if wanted else None for source, wanted in zip(given.sources, read, strict=True)]
    for weight, _ in given.weights:
        kept += [weight if needs.sources[0] else None, None]
    for update, (a, b, columns), wants in zip(plan.updates, given.factors, needs.factors, strict=True):
        below = needs.sources[plan.read(update.source)]
        kept += [a if below else None, b if below or wants[0] else None, columns]
    return kept


class _Backward:
    """The gradients of one call. Sums are made in place, of products that nothing has kept: all of it has gradients."""

    def __init__(self, ctx: Any, grads: Sequence[Tensor | None]) -> None:
        self._plan: _Plan = ctx.plan
        self._dtype: torch.dtype | None = ctx.dtype
        self._shape: torch.Size = ctx.shape
        self._ranks: list[int] = ctx.ranks
        saved = ctx.saved_tensors
        self._given = _Given.of(self._plan, saved[0], saved[1 : ctx.given])
        self._needs = _Given.of(self._plan, ctx.needs_input_grad[2], ctx.needs_input_grad[3:])
        count = len(self._plan.maps)
        self._results = [None if grad is None else _rows(grad) for grad in grads[:count]]
        self._of_hidden = grads[count:]
        self._hidden = _apart(self._plan, saved[ctx.given :], self._ranks)
        wanted = [any(self._needs.factors[n][0] for n in numbers) for numbers in self._plan.of]
        self._first = wanted
        self._second = [self._needs.sources[self._plan.read(s)] for s in range(self._plan.sources)]
        self._below = [a or b for a, b in zip(wanted, self._second, strict=True)]
        self._sums: list[Tensor | None] = [None] * self._plan.sources
        self._narrow: list[Tensor | None] = [None] * len(self._plan.updates)
        self._factors: list[list[Tensor | None]] = [[None] * 3 for _ in self._plan.updates]

    def gradients(self) -> list[Tensor | None]:
        """For the input and for all that `_flat` gives, in order."""
        weights = [grad for number in range(len(self._plan.maps)) for grad in self._of_map(number)]
        for source, below in enumerate(self._below):
            if below and self._plan.of[source]:
                self._of_source(source)
        sums = [None if total is None else total.view(self._shape) for total in self._sums]
        return [*sums, *weights, *(grad for three in self._factors for grad in three)]

    def _add(self, source: int, a: Tensor, b: Tensor) -> None:
        total = self._sums[source]
        self._sums[source] = a @ b if total is None else total.addmm_(a, b)

    def _add_masked(self, source: int, a: Tensor, b: Tensor) -> None:
        mask = _rows(self._given.sources[source])
        if self._sums[0] is not None and not torch.is_grad_enabled():
            add_masked_product(self._sums[0], mask, a, b)
            return
        product = masked(a @ b, mask)
        self._sums[0] = product if self._sums[0] is None else self._sums[0] + product

    def _down(self, source: int, grad: Tensor) -> Tensor:
        """The gradient of the first factors of a source's updates, from that of ``A z``."""
        rows = _rows(self._given.sources[source])
        if not self._plan.masked[source]:
            return grad.t() @ rows
        x = _rows(self._given.sources[0])
        return grad.t() @ masked(x, rows) if torch.is_grad_enabled() else product_of_masked(grad, x, rows)

    def _of_map(self, number: int) -> tuple[Tensor | None, Tensor | None]:
        """Of a weight and its bias, and of the factors of its updates; what the map says of the input's is added up."""
        grad, transposed = self._results[number], self._plan.maps[number].transposed
        if grad is None:
            return None, None
        for update in self._plan.at[number]:
            self._of_update(update, grad)
        if self._needs.sources[0]:
            weight = cast(self._given.weights[number][0], self._dtype)
            self._add(0, grad, weight.t() if transposed else weight)
        weight_grad = None
        if self._needs.weights[number][0]:
            rows = _rows(self._given.sources[0])
            weight_grad = rows.t() @ grad if transposed else grad.t() @ rows
        return weight_grad, grad.sum(0) if self._needs.weights[number][1] else None

    def _of_update(self, number: int, grad: Tensor) -> None:
        """Of the second factor, and of ``A z``, ``[rows, rank]``."""
        update, (_, b, columns) = self._plan.updates[number], self._given.factors[number]
        own = _own(grad, columns, update)
        if self._second[update.source] or self._needs.factors[number][0]:
            self._narrow[number] = (own @ cast(b, self._dtype)) * update.scale
        if self._needs.factors[number][1]:
            hidden = self._hidden[number]
            assert hidden is not None
            # The wide side last: twice as fast on a CPU.
            self._factors[number][1] = ((hidden * update.scale).t() @ own).t()

    def _of_source(self, source: int) -> None:
        """Of the first factors of its updates; what they say of the source's is added up."""
        numbers, grad = self._plan.of[source], self._of_hidden[source]
        whole = grad is not None
        sizes = [self._ranks[number] for number in numbers]
        parts = [self._narrow[number] for number in numbers]
        like = next((part for part in parts if part is not None), None)
        if like is not None:
            missing = like.new_zeros
            every = [missing(len(like), n) if p is None else p for p, n in zip(parts, sizes, strict=True)]
            grad = _joined(every, 1) if grad is None else grad + _joined(every, 1)
        if grad is None:
            return
        if self._second[source]:
            down = _stacked(numbers, self._given, self._dtype)
            (self._add_masked if self._plan.masked[source] else self._add)(source, grad, down)
        if self._first[source]:
            made = self._down(source, grad)
            for number, part in zip(numbers, torch.split(made, sizes), strict=True):
                if self._needs.factors[number][0] and (self._narrow[number] is not None or whole):
                    self._factors[number][0] = part


def _own(grad: Tensor, columns: Tensor | None, update: Update) -> Tensor:
    """The columns of a result's gradient that an update is for: ``[rows, out]``."""
    if columns is not None:
        return grad.index_select(1, columns)
    if not update.runs:
        return grad
    return _joined([grad[:, start:end] for start, end in update.runs], 1)
