"""C3A: an update with circulant blocks (Chen et al. 2025, arXiv:2407.19342)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from graftc.passes.core.build.builder import Builder, Initialiser
from graftc.passes.core.method.capabilities import Exchangeable
from graftc.passes.core.method.lowrank import check_divides, normal, within, zeros
from graftc.passes.core.method.method import Method
from graftc.passes.core.ops.circulants import circulant, matrix_of
from graftc.passes.core.sites.sites import LinearSite
from graftc.passes.core.sites.uses import Dense
from graftc.passes.core.weights.folds import Fold, weight_fold
from graftc.specs.methods.c3a import C3A

aten = torch.ops.aten


class C3AMethod(Method[C3A, LinearSite], Exchangeable[C3A]):
    """``y = W x + b + U x / in``, where block ``(i, j)`` of ``U`` has the first row ``kernel[i, j]``.

    The entry at row ``t`` and column ``c`` of a block is entry ``(c - t) mod block_size`` of its kernel. The kernel,
    which is smaller than ``x`` and ``U``, is divided by ``in``.
    """

    def insert(self, spec: C3A, site: LinearSite, shared: Any, build: Builder) -> None:
        """Insert the branch.

        Raises:
            GraftError: GC002 when the block size does not divide a side of the site.
        """
        size = spec.block_size
        check_divides(site, "block_size", size)
        shape = (*site.leading, site.out_features // size, site.in_features // size, size)
        kernel = build.parameter("kernel", shape, _start(spec, site), dtype=site.dtype)
        kernel = build.call(aten.div.Tensor, kernel, site.in_features, part="scale")
        x, axes = build.input(site), kernel.meta["val"].dim()
        if isinstance(site.use, Dense) and axes == 3:
            delta = build.call(torch.ops.graftc.circulant_product.default, x, kernel, part="product")
        else:
            delta = build.map(site, x, circulant(partial(build.call, part="matrix"), kernel, axes, size))
        build.add(site, delta)

    def repeats(self, spec: C3A) -> bool:
        """Return True, since the insertion depends only on the spec and the types of the site's tensors."""
        return True

    def fold(self, spec: C3A, site: LinearSite, tensors: Mapping[str, Tensor]) -> Fold:
        """Fold the update into the weight: ``W' = W + U / in``."""
        return weight_fold(lambda weight: torch.add(weight, matrix_of(tensors["kernel"]) / weight.shape[-1]))

    def exchangeable(self, spec: C3A, size: int) -> C3A:
        """Return the spec with kernels that start at zero; their sizes follow from the base and the block size."""
        return spec.model_copy(update={"init": "zeros"})


def _start(spec: C3A, site: LinearSite) -> Initialiser:
    """Return the initialiser of the kernel."""
    if spec.init == "gaussian":
        return normal(1)
    sides = {"xavier": 6 / (site.in_features + site.out_features), "kaiming": 1 / site.in_features}
    return within(math.sqrt(sides[spec.init])) if spec.init in sides else zeros
