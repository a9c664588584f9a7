"""LoHa: a low-rank Hadamard product (Hyeon-Woo et al. 2022, arXiv:2108.06098; LyCORIS, arXiv:2309.14859)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from graftc.passes.core.build.builder import Builder
from graftc.passes.core.method.lowrank import check_rank, uniform, zeros
from graftc.passes.core.method.method import Method
from graftc.passes.core.sites.sites import LinearSite, Site
from graftc.passes.core.weights.folds import Fold, WeightFold
from graftc.specs.methods.loha import LoHa

aten = torch.ops.aten


class LoHaMethod(Method[LoHa]):
    """``y = W x + b + (s (B1 A1) * (B2 A2)) x`` with ``s = alpha / rank``.

    ``A2`` is initially zero. The other factors are uniform within ``1 / sqrt(columns)``, Kaiming's bound at ``a =
    sqrt(5)``. The scale is applied to ``B1``, the smallest matrix to which it can be applied.
    """

    spec_class = LoHa

    def insert(self, spec: LoHa, site: Site, shared: Any, build: Builder) -> None:
        """Insert the branch.

        Raises:
            GraftError: GC020 when the rank exceeds ``min(in, out)``.
        """
        assert isinstance(site, LinearSite)
        check_rank(site, spec.rank)
        first = _product(spec, site, build, "1", scale=spec.scaling)
        second = _product(spec, site, build, "2")
        delta = build.call(aten.mul.Tensor, first, second, part="delta")
        build.add(site, build.map(site, build.input(site), delta))

    def fold(self, spec: LoHa, site: Site, tensors: Mapping[str, Tensor]) -> Fold:
        """``W' = W + s (B1 A1) * (B2 A2)``."""

        def apply(weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
            first = tensors["B1"] @ tensors["A1"]
            return torch.add(weight, first * (tensors["B2"] @ tensors["A2"]), alpha=spec.scaling), bias

        return WeightFold(apply)


def _product(spec: LoHa, site: LinearSite, build: Builder, number: str, scale: float = 1) -> fx.Node:
    """``scale B A`` of one pair of factors, ``[..., out, in]``."""
    down_shape = (*site.leading, spec.rank, site.in_features)
    up_shape = (*site.leading, site.out_features, spec.rank)
    down = build.parameter(f"A{number}", down_shape, uniform if number == "1" else zeros, dtype=site.dtype)
    up = build.parameter(f"B{number}", up_shape, uniform, dtype=site.dtype)
    if scale != 1:
        up = build.call(aten.mul.Tensor, up, scale, part="scale")
    return build.call(aten.matmul.default, up, down, part=f"product {number}")
