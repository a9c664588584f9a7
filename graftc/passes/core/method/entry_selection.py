"""Select an exact number of entries of stored tensors: the largest, a share of each tensor, or a random draw."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from graftc.compat.fake_tensors import FakeTensor
from graftc.passes.core.weights.weight_slice import index_type


def largest(scores: Sequence[Callable[[], Tensor]], count: int) -> list[Tensor]:
    """Return the indices of the ``count`` largest scores overall, in ascending order within each group.

    Exactly ``count`` indices are returned: among equal scores, the first ones are selected. At most one group's scores
    and ``count`` other values are in memory at a time.

    Args:
        scores: for each group, a function that computes its scores. It is called more than once; NaN counts as smaller
            than any other value.
        count: the number of scores to select, at most the total number of scores.
    """
    if scores and isinstance(scores[0](), FakeTensor):
        return _as_many(scores, count)
    best = torch.empty(0)
    for make in scores:
        own = _ordered(make())
        if count and best.numel() == count:
            own = own[own > best.min()]  # smaller scores cannot change the result
        best = _top(torch.cat([best.to(own), _top(own, count)]), count)
    if not count:
        return [torch.empty(0, dtype=torch.int64, device=best.device) for _ in scores]
    least = best.min()
    left = count - int((best > least).sum())
    chosen: list[Tensor] = []
    for make in scores:
        own = _ordered(make())
        equal = torch.nonzero(own == least).flatten()[:left]
        left -= equal.numel()
        taken = (own > least).index_fill_(0, equal, True)  # to sort the indices would take longer than to find them
        chosen.append(torch.nonzero(taken).flatten())
    return chosen


def _top(values: Tensor, count: int) -> Tensor:
    """Return the ``count`` largest values, or all if there are no more, in any order.

    On a CPU, finding the smallest of them takes a third of the time of ``topk``, which also finds their indices.
    """
    if not 0 < count < values.numel():
        return values[: values.numel() if count else 0]
    least = values.kthvalue(values.numel() - count + 1).values
    larger = values[values > least]
    return torch.cat([larger, least.expand(count - larger.numel())])


def _as_many(scores: Sequence[Callable[[], Tensor]], count: int) -> list[Tensor]:
    """Return indices for fake scores, taking as many as possible from each group in turn.

    The operators are those that would sort real scores, so that the cost is the same.
    """
    chosen: list[Tensor] = []
    for make in scores:
        own = _ordered(make())
        chosen.append(own.topk(min(count, own.numel()), sorted=False).indices.sort().values)
        count -= chosen[-1].numel()
    return chosen


def _ordered(scores: Tensor) -> Tensor:
    return scores.reshape(-1).float().nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)


def shares(count: int, sizes: Sequence[int], *, exact: bool = True) -> list[int]:
    """Divide ``count`` among groups in proportion to their sizes.

    Args:
        count: the number to divide, at most the sum of the sizes.
        sizes: sizes of the groups.
        exact: whether the remainder left by rounding down goes to the groups that lost the most, so that the shares add
            up to ``count``.
    """
    total = sum(sizes)
    portions = [count * size // total for size in sizes]
    lost = sorted(range(len(sizes)), key=lambda i: (-(count * sizes[i] % total), i))
    for index in lost[: count - sum(portions)] if exact else ():
        portions[index] += 1
    return portions


def drawn(count: int, size: int, generator: torch.Generator) -> Tensor:
    """Draw ``count`` distinct numbers below ``size``."""
    return torch.randperm(size, generator=generator, dtype=index_type(size))[:count].long()
