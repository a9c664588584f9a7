"""Updates of weights as factors of a LoRA, and a compiled model with a LoRA in the place of other adaptations.

What `combine` and `convert` have in common: either says which update is wanted at which site, and this module makes a
LoRA of it, whose rank may differ from site to site.
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
"""Relative distance below which a range found by random vectors is the whole range of an update in float64."""


@dataclass(frozen=True)
class Factors:
    """An update ``up @ down``: ``down: [..., rank, in]``, ``up: [..., out, rank]``; experts lead."""

    down: Tensor
    up: Tensor

    @property
    def rank(self) -> int:
        """Columns of ``up``."""
        return self.up.shape[-1]

    @property
    def update(self) -> Tensor:
        """The product."""
        return self.up @ self.down

    def padded(self, rank: int) -> Factors:
        """The same update, with zeros up to a rank."""
        more = rank - self.rank
        pad = torch.nn.functional.pad
        return self if more <= 0 else Factors(pad(self.down, (0, 0, 0, more)), pad(self.up, (0, more)))

    def rounded(self, dtype: torch.dtype) -> Factors:
        """The factors in the type in which they are stored, rounded once."""
        return Factors(round_once(self.down, dtype), round_once(self.up, dtype))


class Decomposition:
    """The singular values and vectors of an update, from which factors of any rank are read.

    An update whose rank is known to be small is decomposed through its range, which takes as long as a few products
    with it; that this was all of its range is checked.

    Args:
        update: ``[..., out, in]``, float64.
        at_most: a bound on its rank where one is known.
    """

    def __init__(self, update: Tensor, at_most: int | None = None) -> None:
        self.update = update
        self.norm = float(update.norm())
        found = None if at_most is None else _through_range(update, at_most)
        u, s, v = found or torch.linalg.svd(update, full_matrices=False)
        self._u: Tensor = u
        self._v: Tensor = v
        self.values: Tensor = s

    def rank(self, error: float = 0.0) -> int:
        """The smallest rank whose relative Frobenius error is at most ``error``, one rank for all experts; at least 1.

        With ``error`` 0, the number of singular values that are more than rounding in float64.
        """
        s = self.values.reshape(-1, self.values.shape[-1])
        if not error:
            floor = s.max() * max(self.update.shape[-2:]) * torch.finfo(s.dtype).eps
            return max(1, int((s > floor).sum(-1).max()))
        # tails[k]: what is left out at rank k.
        tails = s.square().sum(0).flip(0).cumsum(0).flip(0).sqrt()
        return max(1, int((tails > error * self.norm).sum()))

    def factors(self, rank: int) -> Factors:
        """The nearest update of a rank, its singular values shared by both factors."""
        root = self.values[..., :rank].sqrt()
        return Factors(root[..., :, None] * self._v[..., :rank, :], self._u[..., :rank] * root[..., None, :])


def _through_range(update: Tensor, at_most: int) -> tuple[Tensor, Tensor, Tensor] | None:
    """The decomposition of an update of small rank; None where it is not as small."""
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
    """The element type of a LoRA's factors at a site: float32 at least."""
    return torch.promote_types(site.dtype, torch.float32)


def distance(found: Tensor, wanted: Tensor) -> float:
    """The Frobenius distance over the norm of what is wanted; 0 where both are zero."""
    return float((found - wanted).norm() / wanted.norm().clamp_min(1e-300))


def lora_of(name: str, target: Target, made: Mapping[SiteKey, Factors], sites: Iterable[LinearSite]) -> LoRA:
    """The spec of a LoRA with a scaling of 1, whose ranks are those of the factors, by overrides where they differ."""
    sites = tuple(sites)
    ranks = {where: rank for where, rank in _ranks(made, sites).items()}
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


def values_of(name: str, made: Mapping[SiteKey, Factors], sites: Iterable[LinearSite]) -> dict[str, Tensor]:
    """The tensors of `lora_of` under their names, at least in float32."""
    sites = tuple(sites)
    ranks, told = _ranks(made, sites), _told_by(sites)
    values: dict[str, Tensor] = {}
    for site in sites:
        key = site.key
        factors = made[key].padded(ranks[told[key]]).rounded(stored_dtype(site))
        tensor = "" if key.name == "weight" else key.name
        for part, value in (("A", factors.down), ("B", factors.up)):
            values[adapter_name(key.module, name, tensor, key.part, part)] = value.contiguous()
    return values


def target_of(sites: Sequence[LinearSite]) -> Target:
    """A target that names modules, and roles where some of the sites are rows of a weight only."""
    modules = tuple(dict.fromkeys(site.key.module for site in sites))
    roles = tuple(dict.fromkeys(site.roles[0] for site in sites if site.roles))
    partial = any(not site.own.whole for site in sites)
    return Target(modules=modules, role=roles) if partial and roles else Target(modules=modules)


def _told_by(sites: Sequence[LinearSite]) -> dict[SiteKey, tuple[str, str | None]]:
    """What an override can tell a site by: its module, and its role where the module has several sites."""
    count = Counter(site.key.module for site in sites)
    return {
        site.key: (site.key.module, site.roles[0] if count[site.key.module] > 1 and site.roles else None)
        for site in sites
    }


def _ranks(made: Mapping[SiteKey, Factors], sites: Sequence[LinearSite]) -> dict[tuple[str, str | None], int]:
    """The rank of every site, the largest of those that no override can tell apart."""
    ranks: dict[tuple[str, str | None], int] = {}
    for key, where in _told_by(sites).items():
        ranks[where] = max(made[key].rank, ranks.get(where, 1))
    return ranks
