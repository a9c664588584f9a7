"""Regions: the entries of stored tensors that an adaptation may choose from, and choices of exactly so many of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from graftc.passes.core.sites import LinearSite, NormSite, ParameterSite, Site
from graftc.passes.core.store import Store
from graftc.passes.core.stored import StoredRows

SMALL = 2**31
"""Tensors with fewer entries than this number them in 32 bits."""


@dataclass(frozen=True)
class Region:
    """The entries of one stored tensor that belong to a site.

    Attributes:
        part: what the tensor is called within its module.
        tensor: its Store name.
        shape: its sizes as it is stored.
        where: the own part of it.
    """

    part: str
    tensor: str
    shape: tuple[int, ...]
    where: StoredRows

    @property
    def total(self) -> int:
        """Entries of the whole tensor."""
        return math.prod(self.shape)

    @property
    def size(self) -> int:
        """How many entries belong to the site."""
        return math.prod(self.own_shape)

    @property
    def own_shape(self) -> tuple[int, ...]:
        """The sizes of what `take` gives."""
        axis = range(len(self.shape))[self.where.axis] if self.shape else -1
        return tuple(self.where.rows.count if index == axis else size for index, size in enumerate(self.shape))

    def take(self, stored: Tensor) -> Tensor:
        """The own part of a tensor of this shape, as it is stored."""
        return self.where.take(stored)

    def own(self, stored: Tensor) -> Tensor:
        """The own entries of a tensor of this shape, flat, in their order there."""
        return self.take(stored).reshape(-1)

    def stored(self, numbers: Tensor) -> Tensor:
        """Where own entries lie in the tensor as it is stored, ``int32`` or ``int64``.

        Args:
            numbers: of own entries, in the order of `own`.
        """
        if not self.where.whole:
            numbers = self.own(torch.arange(self.total, device=numbers.device).view(self.shape))[numbers]
        return numbers.to(torch.int32 if self.total < SMALL else torch.int64)

    def numbers(self, indices: Tensor) -> Tensor:
        """The way back from `stored`, ``int64``."""
        if self.where.whole:
            return indices.long()
        every = self.own(torch.arange(self.total, device=indices.device).view(self.shape))
        back = torch.empty(self.total, dtype=torch.int64, device=indices.device)
        return back.index_copy_(0, every, torch.arange(every.numel(), device=indices.device))[indices.long()]


def regions_of(site: Site, store: Store | Mapping[str, Tensor], *, biases: bool = True) -> tuple[Region, ...]:
    """The tensors of a site, each with what of it is the site's own.

    Args:
        site: a map, a norm or a parameter.
        store: has the tensors by their Store names.
        biases: also what is added to a map.
    """

    def region(tensor: str, own: Callable[[torch.Size], StoredRows] = StoredRows.every) -> Region:
        held = store.get(tensor)
        assert held is not None
        return Region(tensor.rpartition(".")[2], tensor, tuple(held.shape), own(held.shape))

    if isinstance(site, LinearSite):
        found = [region(site.own.tensor, site.stored)]
        bias = site.own_bias
        return (*found, region(bias.tensor, site.stored)) if biases and bias is not None else tuple(found)
    if isinstance(site, NormSite):
        return tuple(region(tensor) for tensor in (site.weight, site.bias) if tensor is not None)
    return (region(site.tensor),) if isinstance(site, ParameterSite) else ()


def largest(scores: Sequence[Callable[[], Tensor]], count: int) -> list[Tensor]:
    """The numbers of the ``count`` largest of all scores, for each group in ascending order.

    Exactly that many: among equals the first ones are taken. Of all groups no more than one, and ``count`` values, are
    in memory at a time.

    Args:
        scores: for each group, what makes its scores, one axis. It is called twice; NaN is smaller than anything.
        count: at most how many there are.
    """
    best = torch.empty(0)
    for make in scores:
        own = _ordered(make())
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
