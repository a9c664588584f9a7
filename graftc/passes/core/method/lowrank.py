"""Helpers for methods with a pair of factors: their shapes, their initialisation, and a gate between them."""

from __future__ import annotations

import math

import torch
from torch import Tensor, fx

from graftc.passes.core.build.builder import Builder, Initialiser
from graftc.passes.core.sites.sites import LinearSite
from graftc.specs.errors.diagnostics import GraftError, Place

aten = torch.ops.aten


def check_rank(site: LinearSite, rank: int) -> None:
    """Check that a rank is not too large for a site.

    Raises:
        GraftError: GC020 when it exceeds ``min(in, out)``.
    """
    limit = min(site.in_features, site.out_features)
    if rank > limit:
        raise GraftError(
            "GC020",
            f"rank {rank} is too large for {site.key}, which is {site.out_features} x {site.in_features}",
            place=Place(path="rank"),
            hint=f"use a rank of at most {limit}, exclude smaller sites, or use overrides if the method supports them",
        )


def check_divides(site: LinearSite, field: str, size: int) -> None:
    """Check that a size, the value of a field of the spec, divides both sides of a site.

    Raises:
        GraftError: GC002 when it does not.
    """
    if site.in_features % size or site.out_features % size:
        common = math.gcd(site.in_features, site.out_features)
        raise GraftError(
            "GC002",
            f"{field}: {size} does not divide both sides of {site.key}, which is {site.out_features} x "
            f"{site.in_features}",
            place=Place(path=field),
            hint=f"use a divisor of {common}, or leave the site out with exclude",
        )


def factors(
    build: Builder,
    site: LinearSite,
    rank: int,
    down: Initialiser,
    up: Initialiser,
    number: str = "",
    *,
    freeze_down: bool = False,
    excess_rank: bool = False,
) -> tuple[fx.Node, fx.Node]:
    """Create ``A: [..., rank, in]`` and ``B: [..., out, rank]`` in the site's dtype; expert axes come first.

    ``number`` is appended to their names if a site has several pairs. With ``freeze_down``, ``A`` does not train.

    Raises:
        GraftError: GC020 when the rank exceeds ``min(in, out)``, unless ``excess_rank`` allows that.
    """
    if not excess_rank:
        check_rank(site, rank)
    a = build.parameter(
        f"A{number}", (*site.leading, rank, site.in_features), down, dtype=site.dtype, trainable=not freeze_down
    )
    return a, build.parameter(f"B{number}", (*site.leading, site.out_features, rank), up, dtype=site.dtype)


def gated(build: Builder, site: LinearSite, a: fx.Node, b: fx.Node, gate: fx.Node) -> tuple[fx.Node, fx.Node]:
    """Return the factors of ``B diag(gate) A``, with ``gate: [..., rank]`` multiplied into the smaller factor.

    This works for every kind of site, including experts and convolutions.
    """
    if site.in_features < site.out_features:
        column = build.call(aten.unsqueeze.default, gate, -1, part="gate")
        return build.call(aten.mul.Tensor, a, column, part="gated"), b
    row = build.call(aten.unsqueeze.default, gate, -2, part="gate")
    return a, build.call(aten.mul.Tensor, b, row, part="gated")


def added(weight: Tensor, b: Tensor, a: Tensor, scale: float = 1) -> Tensor:
    """Return ``weight + scale * b @ a`` for ``weight: [..., out, in]``, without an intermediate tensor of that size."""
    product = torch.addmm if weight.dim() == 2 else torch.baddbmm
    return product(weight, b, a, alpha=scale)


def uniform(tensor: Tensor, generator: torch.Generator) -> None:
    """Fill a tensor uniformly within ``+-1 / sqrt(in)``: the Kaiming bound for ``a = sqrt(5)``, the usual default."""
    within(1 / math.sqrt(tensor.shape[-1]))(tensor, generator)


def within(bound: float) -> Initialiser:
    """Return an initialiser that draws uniformly between ``-bound`` and ``bound``."""

    def fill(tensor: Tensor, generator: torch.Generator) -> None:
        tensor.uniform_(-bound, bound, generator=generator)

    return fill


def normal(deviation: float) -> Initialiser:
    """Return an initialiser that draws from a normal distribution with mean 0 and this standard deviation."""

    def fill(tensor: Tensor, generator: torch.Generator) -> None:
        tensor.normal_(0, deviation, generator=generator)

    return fill


def constant(value: float) -> Initialiser:
    """Return an initialiser that sets all entries to one value."""

    def fill(tensor: Tensor, generator: torch.Generator) -> None:
        tensor.fill_(value)

    return fill


ones = constant(1)


def zeros(tensor: Tensor, generator: torch.Generator) -> None:
    """Fill a tensor with zeros."""
    tensor.zero_()
