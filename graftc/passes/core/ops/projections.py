"""Linear maps of one input, with low-rank updates, in one step.

In plain ATen every map of an input and every update of its result makes a tensor of the result's or of the input's size
that is added up and thrown away. Here updates are added in place to the results that they are for, in the product that
makes them, and what maps and updates say of the input's gradient is added up in one tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

Runs = tuple[tuple[int, int], ...]
"""Columns of a result, as half-open runs; none stand for all of them."""


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
) -> tuple[Tensor, ...]:
    """``y_i = W_i x + b_i``, plus ``scale * B A z`` for each update of it, where ``z`` is ``x`` or another source.

    Gradients are those of the plain products, for everything that wants one, and have gradients themselves. Under
    autocast all is computed in its element type, as products are. Where something else than autograd looks at what is
    computed (`torch.compile`, `torch.func`, forward-mode gradients, tensor subclasses), plain products are taken.

    Args:
        x: ``[..., in]``.
        sources: other inputs of updates, of ``x``'s shape: what dropout has left of it.
        weights: of each map, ``[out, in]`` or ``[in, out]``, with its bias, ``[out]``.
        factors: of each update: ``A: [rank, in]``, ``B: [rows, rank]``, and where ``B``'s rows are not all columns of
            the result or runs of them, which they are, ``int64[rows]``.
        maps: a `Map` for each of ``weights``.
        updates: an `Update` for each of ``factors``.

    Returns:
        ``[..., out]`` for each map.
    """
    tensors = _flat(sources, weights, factors)
    if _watched([x, *tensors]):
        return _plain(x, sources, weights, factors, maps, updates)
    plan = _plan(maps, updates)
    dtype = _autocast_dtype(x)
    if dtype is not None:
        x, *others = (_cast(t, dtype) for t in (x, *sources))
        tensors[: len(others)] = others
    found: tuple[Tensor, ...] = _Projections.apply(plan, dtype, x, *tensors)  # type: ignore[no-untyped-call]
    return found[: len(maps)]


@dataclass(frozen=True)
class _Plan:
    """What is known of a call before it is made.

    Attributes:
        maps, updates: of the call.
        sources: how many there are, the maps' input included.
        of: numbers of the updates of each source.
        at: numbers of the updates of each map.
    """

    maps: tuple[Map, ...]
    updates: tuple[Update, ...]
    sources: int
    of: tuple[tuple[int, ...], ...]
    at: tuple[tuple[int, ...], ...]


@lru_cache(maxsize=1024)
def _plan(maps: tuple[tuple[bool], ...], updates: tuple[tuple[int, int, float, Runs], ...]) -> _Plan:
    made = tuple(Update(*update) for update in updates)
    count = max((update.source for update in made), default=0) + 1
    of = tuple(tuple(i for i, u in enumerate(made) if u.source == s) for s in range(count))
    at = tuple(tuple(i for i, u in enumerate(made) if u.of == m) for m in range(len(maps)))
    return _Plan(tuple(Map(*one) for one in maps), made, count, of, at)


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


def _autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The element type that products have now; None where it is that of their factors."""
    kind = x.device.type
    enabled = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if enabled else None


def _cast(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """As autocast does it, which leaves float64 alone."""
    if dtype is None or tensor.dtype == dtype or tensor.dtype == torch.float64 or not tensor.is_floating_point():
        return tensor
    return tensor.to(dtype)


def _no_autocast(x: Tensor, dtype: torch.dtype | None) -> AbstractContextManager[Any]:
    return nullcontext() if dtype is None else torch.autocast(x.device.type, enabled=False)


class _Projections(torch.autograd.Function):
    """`projections`, whose results also are ``A z`` for the updates of each source, ``[rows, ranks]``: as results they
    can be kept for the backward pass and have gradients there.
    """

    @staticmethod
    def forward(ctx: Any, plan: _Plan, dtype: torch.dtype | None, x: Tensor, *flat: Tensor | None) -> Any:
        given = _Given.of(plan, x, flat)
        with _no_autocast(x, dtype):
            hidden = [
                _rows(given.sources[source]) @ _stacked(numbers, given, dtype).t() if numbers else None
                for source, numbers in enumerate(plan.of)
            ]
            narrow = _apart(plan, hidden, [a.shape[0] for a, _, _ in given.factors])
            outputs = []
            for number, (one, weights) in enumerate(zip(plan.maps, given.weights, strict=True)):
                output = _mapped(x, one, weights[0], weights[1], dtype)
                for n in plan.at[number]:  # while the result is in the cache
                    part, (_, b, columns) = narrow[n], given.factors[n]
                    assert part is not None
                    _add_to(output, part, _cast(b, dtype), columns, plan.updates[n])
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
        with _no_autocast(some, ctx.dtype):
            return None, None, *_Backward(ctx, grads).gradients()


def _mapped(x: Tensor, one: Map, weight: Tensor, bias: Tensor | None, dtype: torch.dtype | None) -> Tensor:
    weight, bias = _cast(weight, dtype), None if bias is None else _cast(bias, dtype)
    if one.transposed:
        return x @ weight if bias is None else torch.addmm(bias, x, weight)
    return nn.functional.linear(x.contiguous(), weight, bias)


def _stacked(numbers: Sequence[int], given: _Given, dtype: torch.dtype | None) -> Tensor:
    """First factors of some updates, ``[ranks, in]``."""
    return _joined([_cast(given.factors[number][0], dtype) for number in numbers], 0)


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
    read = [any(needs.factors[n][0] for n in numbers) for numbers in plan.of]
    read[0] = read[0] or any(wants[0] for wants in needs.weights)
    kept: list[Tensor | None] = [source if wanted else None for source, wanted in zip(given.sources, read, strict=True)]
    for weight, _ in given.weights:
        kept += [weight if needs.sources[0] else None, None]
    for update, (a, b, columns), wants in zip(plan.updates, given.factors, needs.factors, strict=True):
        below = needs.sources[update.source]
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
        self._below = [a or b for a, b in zip(wanted, self._needs.sources, strict=True)]
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

    def _of_map(self, number: int) -> tuple[Tensor | None, Tensor | None]:
        """Of a weight and its bias, and of the factors of its updates; what the map says of the input's is added up."""
        grad, transposed = self._results[number], self._plan.maps[number].transposed
        if grad is None:
            return None, None
        for update in self._plan.at[number]:
            self._of_update(update, grad)
        if self._needs.sources[0]:
            weight = _cast(self._given.weights[number][0], self._dtype)
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
        if self._needs.sources[update.source] or self._needs.factors[number][0]:
            self._narrow[number] = (own @ _cast(b, self._dtype)) * update.scale
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
        if self._needs.sources[source]:
            self._add(source, grad, _stacked(numbers, self._given, self._dtype))
        if self._first[source]:
            made = grad.t() @ _rows(self._given.sources[source])
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


def _plain(
    x: Tensor,
    sources: Sequence[Tensor],
    weights: Sequence[tuple[Tensor, Tensor | None]],
    factors: Sequence[tuple[Tensor, Tensor, Tensor | None]],
    maps: tuple[tuple[bool], ...],
    updates: tuple[tuple[int, int, float, Runs], ...],
) -> tuple[Tensor, ...]:
    """`projections` as the graph had it."""
    linear = nn.functional.linear
    results = [
        linear(x, weight, bias) if not transposed else x @ weight if bias is None else torch.addmm(bias, x, weight)
        for (transposed,), (weight, bias) in zip(maps, weights, strict=True)
    ]
    for (of, source, scale, runs), (a, b, columns) in zip(updates, factors, strict=True):
        hidden = linear((x, *sources)[source], a)
        delta = linear(hidden if scale == 1 else hidden * scale, b)
        results[of] = _added(results[of], delta, columns, runs)
    return tuple(results)


def _added(result: Tensor, delta: Tensor, columns: Tensor | None, runs: Runs) -> Tensor:
    if columns is not None:
        return result.index_copy(-1, columns, result.index_select(-1, columns) + delta)
    parts: list[Tensor] = []
    at = taken = 0
    for start, end in runs:
        if start > at:
            parts.append(result[..., at:start])
        parts.append(result[..., start:end] + delta[..., taken : taken + end - start])
        at, taken = end, taken + end - start
    if at < result.shape[-1] and runs:
        parts.append(result[..., at:])
    return torch.cat(parts, -1) if runs else result + delta
