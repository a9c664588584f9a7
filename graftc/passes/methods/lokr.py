"""LoKr: a low-rank Kronecker product (LyCORIS, Yeh et al. 2024, arXiv:2309.14859)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from graftc.passes.core.build.builder import Builder, Initialiser
from graftc.passes.core.method.lowrank import uniform, zeros
from graftc.passes.core.method.method import Method
from graftc.passes.core.sites.sites import LinearSite
from graftc.passes.core.weights.folds import Fold, weight_fold
from graftc.passes.core.weights.weight_slice import Layout
from graftc.specs.methods.lokr import LoKr

aten = torch.ops.aten


class LoKrMethod(Method[LoKr, LinearSite]):
    """``y = W x + b + (s C ⊗ D) x`` with ``s = alpha / rank``.

    The update's entry at row ``i d1 + k`` and column ``j d2 + l`` is ``s C[i, j] D[k, l]``. In a convolution, ``in``
    counts channels, and ``D`` has one column for each pair of a channel and a kernel point. Every matrix that is not
    initially zero is drawn uniformly within ``±1 / sqrt(columns)``, Kaiming's bound for ``a = sqrt(5)``. The scale is
    applied to ``C``, usually the smaller matrix.
    """

    def insert(self, spec: LoKr, site: LinearSite, shared: Any, build: Builder) -> None:
        """Insert the branch."""
        channels = site.own.shape[1] if site.own.layout is Layout.KERNEL else site.in_features
        (c1, d1), (c2, d2) = split(site.out_features, spec.factor), split(channels, spec.factor)
        points = site.in_features // channels
        full = not spec.decompose_both or _is_full(spec, c1, c2)
        small = _factor(spec, site, build, "C", (c1, c2), zeros, full=full)
        large = _factor(spec, site, build, "D", (d1, d2 * points), uniform, full=_is_full(spec, d1, d2))
        if spec.scaling != 1:
            small = build.call(aten.mul.Tensor, small, spec.scaling, part="scale")
        outer = build.call(aten.mul.Tensor, _spread(build, small, -1, -3), _spread(build, large, -2, -4), part="outer")
        shape = [*site.leading, site.out_features, site.in_features]
        delta = build.call(aten.view.default, outer, shape, part="delta")
        build.add(site, build.map(site, build.input(site), delta))

    def reads_channels(self, spec: LoKr) -> bool:
        """Return True, since the update treats a convolution's channels and the points of its kernel separately."""
        return True

    def fold(self, spec: LoKr, site: LinearSite, tensors: Mapping[str, Tensor]) -> Fold:
        """Fold the product into the weight: ``W' = W + s C ⊗ D``."""

        def change(weight: Tensor) -> Tensor:
            small, large = (tensors[n] if n in tensors else tensors[f"{n}B"] @ tensors[f"{n}A"] for n in "CD")
            return weight + spec.scaling * torch.einsum("...ij,...kl->...ikjl", small, large).reshape(weight.shape)

        return weight_fold(change)


def split(size: int, factor: int) -> tuple[int, int]:
    """Return two integers whose product is ``size``.

    The first is ``factor`` if that divides ``size``; otherwise it is the largest divisor that is at most the square
    root of ``size`` and, unless ``factor`` is -1, at most ``factor``.
    """
    if factor > 0 and size % factor == 0:
        return factor, size // factor
    limit = math.isqrt(size) if factor < 0 else min(math.isqrt(size), factor)
    first = next(n for n in range(limit, 0, -1) if size % n == 0)
    return first, size // first


def _spread(build: Builder, node: fx.Node, *axes: int) -> fx.Node:
    """Insert axes into a factor, so that multiplying it by the other factor pairs all of their entries."""
    for axis in axes:
        node = build.call(aten.unsqueeze.default, node, axis, part="outer")
    return node


def _is_full(spec: LoKr, rows: int, columns: int) -> bool:
    """Return whether a factor is a single matrix, since a product of rank ``rank`` would hardly be smaller."""
    return 2 * spec.rank >= max(rows, columns)


def _factor(
    spec: LoKr,
    site: LinearSite,
    build: Builder,
    name: str,
    shape: tuple[int, int],
    init: Initialiser,
    *,
    full: bool,
) -> fx.Node:
    """Return one factor, as a full matrix or as a product of rank ``rank``.

    ``init`` fills the full matrix, or the first matrix of the product.
    """
    rows, columns = shape
    if full:
        return build.parameter(name, (*site.leading, rows, columns), init, dtype=site.dtype)
    up = build.parameter(f"{name}B", (*site.leading, rows, spec.rank), init, dtype=site.dtype)
    down = build.parameter(f"{name}A", (*site.leading, spec.rank, columns), uniform, dtype=site.dtype)
    return build.call(aten.matmul.default, up, down, part=name)
