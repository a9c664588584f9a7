"""VeRA: trained vectors around shared random matrices (Kopiczko et al. 2024, arXiv:2310.11454)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, fx

from graftc.passes.core.build.builder import Builder, Initialiser
from graftc.passes.core.method.capabilities import RowWise
from graftc.passes.core.method.lowrank import added, constant, gated, within, zeros
from graftc.passes.core.method.method import Method
from graftc.passes.core.sites.sites import LinearSite
from graftc.passes.core.weights.folds import Fold, weight_fold
from graftc.specs.methods.vera import VeRA

aten = torch.ops.aten


Projections = tuple[fx.Node, fx.Node]
"""The nodes of the shared matrices, ``[rank, largest in]`` and ``[largest out, rank]``."""


class VeRAMethod(Method[VeRA, LinearSite], RowWise[VeRA]):
    """``y = W x + c + b * (B d A drop(x))``, with ``d`` and ``b`` as diagonal matrices.

    ``A`` and ``B`` belong to the adaptation as a whole. Their elements are drawn uniformly within
    ``±sqrt(6 / columns)``, Kaiming's bound for a ReLU, where the number of columns is the largest ``in`` for ``A`` and
    the rank for ``B``. They are saved with the adapters, so loading does not depend on a random generator.
    """

    def prepare(self, spec: VeRA, sites: Sequence[LinearSite], build: Builder) -> Projections:
        """Create the two matrices, as large as the largest site needs."""
        a_shape = (spec.rank, max(site.in_features for site in sites))
        b_shape = (max(site.out_features for site in sites), spec.rank)
        dtype = sites[0].dtype
        return (
            build.parameter("A", a_shape, _drawn(spec, ()), dtype=dtype, trainable=False),
            build.parameter("B", b_shape, _drawn(spec, a_shape), dtype=dtype, trainable=False),
        )

    def insert(self, spec: VeRA, site: LinearSite, shared: Projections, build: Builder) -> None:
        """Insert the branch, which uses the site's part of the matrices."""
        d = build.parameter("d", (spec.rank,), constant(spec.d_initial), dtype=site.dtype)
        b = build.parameter("b", (site.out_features,), zeros, dtype=site.dtype)
        down = build.call(aten.slice.Tensor, shared[0], 1, 0, site.in_features, part="own columns")
        up = build.call(aten.slice.Tensor, shared[1], 0, 0, site.out_features, part="own rows")
        x = build.dropout(build.input(site), spec.dropout)
        delta = build.low_rank(site, x, *gated(build, site, down, up, d))
        build.add(site, build.call(aten.mul.Tensor, delta, b, part="b"))

    def fold(self, spec: VeRA, site: LinearSite, tensors: Mapping[str, Tensor]) -> Fold:
        """Fold the update into the weight: ``W' = W + diag(b) B diag(d) A``."""
        b, d = tensors["b"], tensors["d"]

        def change(weight: Tensor) -> Tensor:
            down, up = tensors["A"][:, : weight.shape[-1]], tensors["B"][: weight.shape[-2]]
            return added(weight, b[:, None] * (up * d), down)

        return weight_fold(change)

    def row_axes(self, spec: VeRA) -> Mapping[str, int]:
        """Return the row axes of ``B`` and ``b``."""
        return {"B": -2, "b": -1}


def _drawn(spec: VeRA, before: tuple[int, ...]) -> Initialiser:
    """Return an initialiser that draws uniformly within ``±sqrt(6 / columns)``.

    With a ``projection_seed``, B is drawn from the same generator after A, whose shape is ``before``.
    """

    def fill(tensor: Tensor, generator: torch.Generator) -> None:
        if spec.projection_seed is not None:
            generator = torch.Generator().manual_seed(spec.projection_seed)
            if before:
                torch.empty(before).uniform_(generator=generator)
        within(math.sqrt(6 / tensor.shape[-1]))(tensor, generator)

    return fill
