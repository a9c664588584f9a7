"""Decompose weight updates into LoRA factors, and build the spec and tensors of a LoRA from them.

`combine` and `convert` share this module: they determine the wanted update at every site, and this module turns it into
a LoRA whose rank may differ from site to site.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from graftc.passes.core.sites.sites import LinearSite, SiteKey
from graftc.passes.core.weights.folds import round_once
from graftc.passes.core.weights.names import adapter_name
from graftc.specs.methods.lora import LoRA, LoRAOverride
from graftc.specs.target import Target

_EXACT = 1e-13
"""The relative distance below which a range found with random vectors counts as an update's whole range in float64."""


@dataclass(frozen=True)
class Factors:
    """The factors of an update ``up @ down``, or of the updates of all experts along a leading axis.

    The shapes are ``down: [..., rank, in]`` and ``up: [..., out, rank]``.
    """

    down: Tensor
    up: Tensor

    @property
    def rank(self) -> int:
        """The number of columns of ``up``."""
        return self.up.shape[-1]

    @property
    def update(self) -> Tensor:
        """The product of the factors."""
        return self.up @ self.down

    def padded(self, rank: int) -> Factors:
        """Return the same update, padded with zeros up to a rank."""
        more = rank - self.rank
        pad = torch.nn.functional.pad
        return self if more <= 0 else Factors(pad(self.down, (0, 0, 0, more)), pad(self.up, (0, more)))

    def rounded(self, dtype: torch.dtype) -> Factors:
        """Return the factors in the dtype in which they are stored, rounded once."""
        return Factors(round_once(self.down, dtype), round_once(self.up, dtype))


class Decomposition:
    """An update's singular values and vectors, which yield factors of any rank.

    Rows and columns of zeros are left out of the decomposition. If what is left has full rank, one of the factors of
    that rank selects its rows or its columns (it is one-hot), and the other one holds the update itself, unchanged.

    An update whose rank is known to be small is decomposed through its range, which takes only a few matrix
    products; a check verifies that they capture the whole range.

    Args:
        update: the update ``[..., out, in]``, float64.
        at_most: an upper bound on its rank, if one is known.
    """

    def __init__(self, update: Tensor, at_most: int | None = None) -> None:
        self.shape = update.shape[-2:]
        self._rows, self._columns = (_nonzero(update, axis) for axis in (-2, -1))
        kept = (self._rows.numel(), self._columns.numel())
        self.update = update if kept == self.shape else update[..., self._rows[:, None], self._columns]
        self.norm = float(update.norm())
        through_range = None if at_most is None else _through_range(self.update, at_most)
        u, s, v = through_range or torch.linalg.svd(self.update, full_matrices=False)
        self._u: Tensor = u
        self._v: Tensor = v
        self.values: Tensor = s

    def rank(self, error: float = 0.0) -> int:
        """Return the smallest rank, at least 1, whose relative Frobenius error over all experts is at most ``error``.

        If ``error`` is 0, return the number of singular values that exceed the rounding error of float64.
        """
        s = self.values.reshape(-1, self.values.shape[-1])
        if not error:
            floor = s.max() * max(self.shape) * torch.finfo(s.dtype).eps
            return max(1, int((s > floor).sum(-1).max()))
        # tails[k]: the norm of the part that rank k leaves out.
        tails = s.square().sum(0).flip(0).cumsum(0).flip(0).sqrt()
        return max(1, int((tails > error * self.norm).sum()))

    def factors(self, rank: int) -> Factors:
        """Return the factors of the nearest update of a given rank.

        They are one-hot if the update has just as many rows or columns; otherwise, both get the square root of each
        singular value.
        """
        rows, columns = self.update.shape[-2:]
        if rank >= min(rows, columns) == self.rank():
            eye = torch.eye(min(rows, columns), dtype=self.update.dtype, device=self.update.device)
            one_hot = eye.expand(*self.update.shape[:-2], *eye.shape)
            down, up = (one_hot, self.update) if columns <= rows else (self.update, one_hot)
        else:
            root = self.values[..., :rank].sqrt()
            down, up = root[..., :, None] * self._v[..., :rank, :], self._u[..., :rank] * root[..., None, :]
        return Factors(_spread(down, self._columns, -1, self.shape[1]), _spread(up, self._rows, -2, self.shape[0]))


def _nonzero(update: Tensor, axis: int) -> Tensor:
    """Return the indices along an axis at which an update is not zero everywhere; all of them if it is zero."""
    others = [other for other in range(update.dim()) if other != update.dim() + axis]
    some = (update != 0).sum(others) > 0
    return (some if bool(some.any()) else ~some).nonzero().flatten()


def _spread(factor: Tensor, index: Tensor, axis: int, size: int) -> Tensor:
    """Return a factor with its rows or columns at the given indices, among others that are zero."""
    shape = list(factor.shape)
    shape[axis] = size
    return factor.new_zeros(shape).index_copy_(factor.dim() + axis, index, factor)


def _through_range(update: Tensor, at_most: int) -> tuple[Tensor, Tensor, Tensor] | None:
    """Return the decomposition of an update with a small rank; None if the rank is too large."""
    width = at_most + 4
    if 4 * width > min(update.shape[-2:]):
        return None
    generator = torch.Generator().manual_seed(0)
    probes = torch.randn(update.shape[-1], width, generator=generator, dtype=update.dtype).to(update.device)
    basis = torch.linalg.qr(update @ probes).Q
    inner = basis.mT @ update
    if float((update - basis @ inner).norm()) > _EXACT * float(update.norm()):
        return None
    u, s, v = torch.linalg.svd(inner, full_matrices=False)
    return basis @ u, s, v


def stored_dtype(site: LinearSite) -> torch.dtype:
    """Return the dtype of a LoRA's factors at a site: at least float32."""
    return torch.promote_types(site.dtype, torch.float32)


def distance(actual: Tensor, wanted: Tensor) -> float:
    """Return the Frobenius distance relative to the norm of ``wanted``; 0 if both are zero."""
    return float((actual - wanted).norm() / wanted.norm().clamp_min(1e-300))


def lora_of(name: str, target: Target, factors: Mapping[SiteKey, Factors], sites: Iterable[LinearSite]) -> LoRA:
    """Return the spec of a LoRA with a scaling of 1 and the factors' ranks, with overrides where they differ."""
    sites = tuple(sites)
    ranks = {where: rank for where, rank in _ranks(factors, sites).items()}
    usual = Counter(ranks.values()).most_common(1)[0][0]
    others: dict[tuple[int, str | None], list[str]] = {}
    for (module, role), rank in ranks.items():
        if rank != usual:
            others.setdefault((rank, role), []).append(module)
    overrides = [
        LoRAOverride(modules=modules, role=role, rank=rank, alpha=float(rank))
        for (rank, role), modules in sorted(others.items(), key=lambda item: (item[0][1] is None, item[0][0]))
    ]
    return LoRA(name=name, target=target, rank=usual, alpha=float(usual), overrides=tuple(overrides))


def values_of(name: str, factors_by_site: Mapping[SiteKey, Factors], sites: Iterable[LinearSite]) -> dict[str, Tensor]:
    """Return the tensors, by name, of the LoRA that `lora_of` returns, in float32 or wider."""
    sites = tuple(sites)
    ranks, told = _ranks(factors_by_site, sites), _told_by(sites)
    values: dict[str, Tensor] = {}
    for site in sites:
        key = site.key
        factors = factors_by_site[key].padded(ranks[told[key]]).rounded(stored_dtype(site))
        tensor = "" if key.name == "weight" else key.name
        for part, value in (("A", factors.down), ("B", factors.up)):
            values[adapter_name(key.module, name, tensor, key.part, part)] = value.contiguous()
    return values


def target_of(sites: Sequence[LinearSite]) -> Target:
    """Return a target that names modules, and also roles if some sites cover only part of a weight's rows."""
    modules = tuple(dict.fromkeys(site.key.module for site in sites))
    roles = tuple(dict.fromkeys(site.roles[0] for site in sites if site.roles))
    partial = any(not site.own.whole for site in sites)
    return Target(modules=modules, role=roles) if partial and roles else Target(modules=modules)


def _told_by(sites: Sequence[LinearSite]) -> dict[SiteKey, tuple[str, str | None]]:
    """Return the module and role by which an override can select each site; no role if the module has only one site."""
    count = Counter(site.key.module for site in sites)
    return {
        site.key: (site.key.module, site.roles[0] if count[site.key.module] > 1 and site.roles else None)
        for site in sites
    }


def _ranks(factors: Mapping[SiteKey, Factors], sites: Sequence[LinearSite]) -> dict[tuple[str, str | None], int]:
    """Return the rank of every site, or the largest rank among sites that no override can distinguish."""
    ranks: dict[tuple[str, str | None], int] = {}
    for key, where in _told_by(sites).items():
        ranks[where] = max(factors[key].rank, ranks.get(where, 1))
    return ranks
