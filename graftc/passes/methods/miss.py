"""MiSS: a trained matrix that all shards of a weight share (Kang and Yin 2024, arXiv:2409.15371)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from graftc.passes.core.build.builder import Builder
from graftc.passes.core.build.effective_weight import effective_weight
from graftc.passes.core.method.capabilities import RowWise
from graftc.passes.core.method.lowrank import zeros
from graftc.passes.core.method.method import Method
from graftc.passes.core.sites.sites import LinearSite
from graftc.passes.core.weights.folds import Fold, weight_fold
from graftc.specs.errors.diagnostics import GraftError, Place
from graftc.specs.limits import SIZE
from graftc.specs.methods.miss import MiSS

aten = torch.ops.aten


class MiSSMethod(Method[MiSS, LinearSite], RowWise[MiSS]):
    """``W'[o, j] = W[o, j] + D[j mod rank, o]``, computed as ``D`` times the sum of the input's shards.

    With ``mini``, ``D: [rank, mini_rank]`` is repeated along ``o``. With ``bat``, ``D: [out / rank, rank, rank]`` has a
    matrix for each block of rows, and ``W'_ij = W_ij + W_ij D_i + D_i`` for square blocks. Experts' axes come first.
    """

    def insert(self, spec: MiSS, site: LinearSite, shared: Any, build: Builder) -> None:
        """Insert the branch.

        Raises:
            GraftError: GC020 for a rank that exceeds ``in``, or a size that must divide the site's and does not; with
                ``bat``, GC017 if another adaptation at the site cannot be expressed as a change to the weights.
        """
        _check_sizes(spec, site)
        x = build.dropout(build.input(site), spec.dropout)
        own = build.parameter("D", (*site.leading, *_shape(spec, site)), zeros, dtype=site.dtype)
        if spec.variant == "bat":
            build.add(site, build.map(site, x, _blockwise(build, site, own)))
            return
        rows = build.call(aten.transpose.int, own, -1, -2, part="rows")
        if spec.variant == "mini":
            rows = _repeated(build, rows, -2, site.out_features // spec.mini_rank)
        if site.use.input_axis in (-1, -2):
            x = _sum_of_shards(build, x, site.use.input_axis, site.in_features, spec.rank)
        else:
            shards = -(-site.in_features // spec.rank)
            rows = _repeated(build, rows, -1, shards)
            rows = build.call(aten.slice.Tensor, rows, -1, 0, site.in_features, part="delta")
        build.add(site, build.map(site, x, rows))

    def repeats(self, spec: MiSS) -> bool:
        """Return whether the update is independent of the weight."""
        return spec.variant != "bat"

    def fold(self, spec: MiSS, site: LinearSite, tensors: Mapping[str, Tensor]) -> Fold:
        """Fold the update into the weight."""
        own = tensors["D"]

        def change(weight: Tensor) -> Tensor:
            rows, columns = weight.shape[-2:]
            if spec.variant == "bat":
                leading, rank = weight.shape[:-2], spec.rank
                blocks = weight.reshape(*leading, rows // rank, columns, rank) @ own
                square = blocks.reshape(*leading, rows // rank, rank, columns // rank, rank) + own.unsqueeze(-2)
                return weight + square.reshape(weight.shape)
            ones = [1] * (own.dim() - 2)
            wide = own.repeat(*ones, -(-columns // spec.rank), rows // own.shape[-1])
            return weight + wide[..., :columns, :].mT

        return weight_fold(change)

    def row_axes(self, spec: MiSS) -> Mapping[str, int]:
        """Return the row axis of ``D``; in other variants than ``balance``, it has none."""
        return {"D": -1} if spec.variant == "balance" else {}

    def fewest_rows(self, spec: MiSS) -> int:
        """Return 1, or more than any weight has for the variants in which several rows share an entry of ``D``."""
        return 1 if spec.variant == "balance" else SIZE**2


def _check_sizes(spec: MiSS, site: LinearSite) -> None:
    """Raise GC020 for sizes that do not fit a site."""
    rows, columns = site.out_features, site.in_features
    field, problem = "rank", ""
    if spec.rank > columns:
        problem = f"rank {spec.rank} exceeds the inputs of {site.key}"
    elif spec.variant == "bat" and (rows % spec.rank or columns % spec.rank):
        problem = f"variant bat divides {site.key} into square blocks, but rank {spec.rank} does not divide both sides"
    elif spec.variant == "mini" and rows % spec.mini_rank:
        field, problem = "mini_rank", f"mini_rank {spec.mini_rank} does not divide the outputs of {site.key}"
    if problem:
        hint = "choose another size, exclude the site, or use overrides"
        raise GraftError("GC020", f"{problem}, which is {rows} x {columns}", place=Place(path=field), hint=hint)


def _shape(spec: MiSS, site: LinearSite) -> tuple[int, ...]:
    """Return the shape of ``D`` at a site, without the axis of experts."""
    if spec.variant == "bat":
        return site.out_features // spec.rank, spec.rank, spec.rank
    return spec.rank, spec.mini_rank if spec.variant == "mini" else site.out_features


def _sum_of_shards(build: Builder, x: fx.Node, axis: int, size: int, rank: int) -> fx.Node:
    """Return the sum of the parts of width ``rank`` into which an axis is divided, the last one padded with zeros."""
    missing = -size % rank
    if missing:
        x = build.call(aten.constant_pad_nd.default, x, [0, 0] * (-axis - 1) + [0, missing], part="shards")
    shards = build.call(aten.unflatten.int, x, axis, [(size + missing) // rank, rank], part="shards")
    return build.call(aten.sum.dim_IntList, shards, [axis - 1], part="sum of shards")


def _repeated(build: Builder, node: fx.Node, axis: int, count: int) -> fx.Node:
    """Repeat a tensor along an axis counted from the end."""
    counts = [1] * node.meta["val"].dim()
    counts[axis] = count
    return build.call(aten.repeat.default, node, counts, part="repeated")


def _blockwise(build: Builder, site: LinearSite, own: fx.Node) -> fx.Node:
    """Return the update whose block ``ij`` is ``W_ij D_i + D_i``, ``[..., out, in]``."""
    rank = int(own.meta["val"].shape[-1])
    weight = build.cast(effective_weight(build, site).weight, own.meta["val"].dtype)
    sizes = [*site.leading, site.out_features // rank, site.in_features, rank]
    blocks = build.call(aten.reshape.default, weight, sizes, part="blocks")
    product = build.call(aten.matmul.default, blocks, own, part="blocks")
    product = build.call(aten.unflatten.int, product, -2, [rank, site.in_features // rank], part="blocks")
    delta = build.call(aten.add.Tensor, product, build.call(aten.unsqueeze.default, own, -2), part="delta")
    for axis in (-4, -2):
        delta = build.call(aten.flatten.using_ints, delta, axis, axis + 1, part="delta")
    return delta
