"""HiRA: a weight times a low-rank matrix, elementwise (Huang et al. 2025, ICLR, OpenReview TwJrTz9cRS)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from graftc.passes.core.build.builder import Builder, Initialiser
from graftc.passes.core.build.effective_weight import effective_weight
from graftc.passes.core.method.capabilities import Exchangeable, RowWise
from graftc.passes.core.method.lowrank import factors, normal, uniform, zeros
from graftc.passes.core.method.method import Method
from graftc.passes.core.sites.sites import EmbeddingSite, LinearSite
from graftc.passes.core.weights.folds import Fold, weight_fold
from graftc.passes.core.weights.weight_slice import Layout
from graftc.passes.methods.bases.low_rank import kept
from graftc.specs.methods.hira import HiRA

aten = torch.ops.aten


class HiRAMethod(Method[HiRA, LinearSite], RowWise[HiRA], Exchangeable[HiRA]):
    """``y = W x + b + (W * (B A)) drop(x)`` with ``A: [rank, in]`` and ``B: [out, rank]``.

    ``W`` is the base's weight with the adaptations that are already inserted at the site folded in. A column of the
    update is the same column of ``W`` times that of ``B A``, so a table looks up both and multiplies the results.
    """

    def insert(self, spec: HiRA, site: LinearSite, shared: Any, build: Builder) -> None:
        """Insert the branch.

        Raises:
            GraftError: GC020 when the rank exceeds ``min(in, out)`` without ``excess_rank``, GC017 if another
                adaptation at the site cannot be expressed as a change to the weights.
        """
        a, b = factors(build, site, spec.rank, *_starts(spec, site), excess_rank=spec.excess_rank)
        weight = build.cast(effective_weight(build, site).weight, b.meta["val"].dtype)
        x = build.dropout(build.input(site), spec.dropout)
        if isinstance(site, EmbeddingSite):
            entries = build.map(site, x, weight, part="entries")
            delta = build.call(aten.mul.Tensor, entries, build.low_rank(site, x, a, b), part="delta")
        else:
            product = build.call(aten.matmul.default, b, a, part="product")
            delta = build.map(site, x, build.call(aten.mul.Tensor, weight, product, part="delta"))
        build.add(site, delta)

    def fold(self, spec: HiRA, site: LinearSite, tensors: Mapping[str, Tensor]) -> Fold:
        """Fold the update into the weight: ``W' = W + W * (B A)``."""
        return weight_fold(lambda weight: torch.addcmul(weight, weight, tensors["B"] @ tensors["A"]))

    def repeats(self, spec: HiRA) -> bool:
        """Return True, since the insertion depends only on the spec and the types of the site's tensors."""
        return True

    def exchangeable(self, spec: HiRA, size: int) -> HiRA:
        """Return the adaptation with this rank at every site."""
        return HiRA(rank=size, excess_rank=True, **kept(spec, "name", "target", "dtype"))

    def row_axes(self, spec: HiRA) -> Mapping[str, int]:
        """Return the row axis of ``B``."""
        return {"B": -2}

    def fewest_rows(self, spec: HiRA) -> int:
        """Return the minimum number of rows: the rank, or 1 if the spec accepts a rank above the number of rows."""
        return 1 if spec.excess_rank else spec.rank


def _starts(spec: HiRA, site: LinearSite) -> tuple[Initialiser, Initialiser]:
    """Return the initialisers of A and B."""
    if spec.init == "random":
        return normal(1), normal(1)
    if isinstance(site, EmbeddingSite):
        return zeros, normal(1)
    return normal(1 / spec.rank) if spec.init == "gaussian" and site.own.layout is not Layout.KERNEL else uniform, zeros
