"""Entries of stored tensors that an adaptation may choose from, and choices of exactly so many of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from graftc.passes.core.sites.sites import LinearSite, NormSite, ParameterSite, Site
from graftc.passes.core.weights.store import Store
from graftc.passes.core.weights.weight_slice import SMALL, WeightSlice


def slices_of(site: Site, store: Store | Mapping[str, Tensor], *, biases: bool = True) -> tuple[WeightSlice, ...]:
    """The tensors of a site, each with what of it is the site's own.

    Args:
        site: a map, a norm or a parameter.
        store: has the tensors by their Store names.
        biases: also what is added to a map.
    """
    if isinstance(site, LinearSite):
        return site.slices if biases else (site.own,)
    names: tuple[str | None, ...] = ()
    if isinstance(site, NormSite):
        names = site.weight, site.bias
    elif isinstance(site, ParameterSite):
        names = (site.tensor,)
    held = ((name, store.get(name)) for name in names if name is not None)
    return tuple(WeightSlice.every(name, tensor) for name, tensor in held if tensor is not None)


def largest(scores: Sequence[Callable[[], Tensor]], count: int) -> list[Tensor]:
    """The numbers of the ``count`` largest of all scores, for each group in ascending order.

    Exactly that many: among equals the first ones are taken. Of all groups no more than one, and ``count`` values, are
    in memory at a time.

    Args:
        scores: for each group, what makes its scores, one axis. It is called twice; NaN is smaller than anything.
        count: at most how many there are.
    """
    if scores and isinstance(scores[0](), FakeTensor):
        return _as_many(scores, count)
    best = torch.empty(0)
    for make in scores:
        own = _ordered(make())
        if count and best.numel() == count:
            own = own[own > best.min()]  # the others change nothing
        best = torch.cat([best.to(own), own.topk(min(count, own.numel()), sorted=False).values])
        best = best.topk(min(count, best.numel()), sorted=False).values
    if not count:
        return [torch.empty(0, dtype=torch.int64, device=best.device) for _ in scores]
    least = best.min()
    left = count - int((best > least).sum())
    found: list[Tensor] = []
    for make in scores:
        own = _ordered(make())
        equal = torch.nonzero(own == least).flatten()[:left]
        left -= equal.numel()
        found.append(torch.cat([torch.nonzero(own > least).flatten(), equal]).sort().values)
    return found


def _as_many(scores: Sequence[Callable[[], Tensor]], count: int) -> list[Tensor]:
    """Numbers for scores that have no values, as many of each group as there may be, with what ordering them takes."""
    found: list[Tensor] = []
    for make in scores:
        own = _ordered(make())
        found.append(own.topk(min(count, own.numel()), sorted=False).indices.sort().values)
        count -= found[-1].numel()
    return found


def _ordered(scores: Tensor) -> Tensor:
    return scores.reshape(-1).float().nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)


def shares(count: int, sizes: Sequence[int], *, exact: bool = True) -> list[int]:
    """``count`` shared out in proportion to sizes.

    Args:
        count: at most the sum of the sizes.
        sizes: of the groups.
        exact: what rounding down leaves goes to those that lost most, so that all of ``count`` is shared out.
    """
    total = sum(sizes)
    found = [count * size // total for size in sizes]
    lost = sorted(range(len(sizes)), key=lambda i: (-(count * sizes[i] % total), i))
    for index in lost[: count - sum(found)] if exact else ():
        found[index] += 1
    return found


def drawn(count: int, size: int, generator: torch.Generator) -> Tensor:
    """``count`` of the numbers below ``size``, each at most once."""
    dtype = torch.int32 if size < SMALL else torch.int64
    return torch.randperm(size, generator=generator, dtype=dtype)[:count].long()
