"""LoHa: a low-rank Hadamard product (Hyeon-Woo et al. 2022, arXiv:2108.06098; LyCORIS, arXiv:2309.14859)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from graftc.passes.core.build.builder import Builder
from graftc.passes.core.method.capabilities import RowWise
from graftc.passes.core.method.lowrank import factors, uniform, zeros
from graftc.passes.core.method.method import Method
from graftc.passes.core.sites.sites import LinearSite
from graftc.passes.core.weights.folds import Fold, weight_fold
from graftc.specs.methods.loha import LoHa

aten = torch.ops.aten


class LoHaMethod(Method[LoHa, LinearSite], RowWise[LoHa]):
    """``y = W x + b + (s (B1 A1) * (B2 A2)) x`` with ``s = alpha / rank``.

    ``A2`` is initially zero. The other factors are drawn uniformly within ``±1 / sqrt(columns)``, Kaiming's bound for
    ``a = sqrt(5)``. The scale is applied to ``B1``, the smallest matrix to which it can be applied.
    """

    def insert(self, spec: LoHa, site: LinearSite, shared: Any, build: Builder) -> None:
        """Insert the branch.

        Raises:
            GraftError: GC020 when the rank exceeds ``min(in, out)`` without ``excess_rank``.
        """
        products = []
        for number, down, scale in (("1", uniform, spec.scaling), ("2", zeros, 1)):
            a, b = factors(build, site, spec.rank, down, uniform, number, excess_rank=spec.excess_rank)
            b = b if scale == 1 else build.call(aten.mul.Tensor, b, scale, part="scale")
            products.append(build.call(aten.matmul.default, b, a, part=f"product {number}"))
        build.add(site, build.map(site, build.input(site), build.call(aten.mul.Tensor, *products, part="delta")))

    def fold(self, spec: LoHa, site: LinearSite, tensors: Mapping[str, Tensor]) -> Fold:
        """Fold the product into the weight: ``W' = W + s (B1 A1) * (B2 A2)``."""

        def change(weight: Tensor) -> Tensor:
            first = tensors["B1"] @ tensors["A1"]
            return torch.add(weight, first * (tensors["B2"] @ tensors["A2"]), alpha=spec.scaling)

        return weight_fold(change)

    def row_axes(self, spec: LoHa) -> Mapping[str, int]:
        """Return the row axes of ``B1`` and ``B2``."""
        return {"B1": -2, "B2": -2}

    def fewest_rows(self, spec: LoHa) -> int:
        """Return the minimum number of rows: the rank, or 1 if the spec accepts a rank above the number of rows."""
        return 1 if spec.excess_rank else spec.rank
