"""LoReFT: edits of the residual stream within a low-rank subspace (Wu et al. 2024, arXiv:2404.03592)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, fx

from graftc.passes.core.build.batch import Batch
from graftc.passes.core.build.builder import Builder
from graftc.passes.core.build.effective_weight import trace
from graftc.passes.core.build.token_masks import token_mask
from graftc.passes.core.ir.shapes import expression
from graftc.passes.core.method.lowrank import uniform, within, zeros
from graftc.passes.core.method.method import Method
from graftc.passes.core.sites.sites import ValueSite, unsupported
from graftc.passes.core.weights.folds import Fold, Keep
from graftc.specs.errors.diagnostics import GraftError, Place
from graftc.specs.methods.loreft import LoReFT

aten = torch.ops.aten
Sizes = tuple[object, ...]
Regions = Mapping[str, fx.Node | None]
"""The tokens that each set of tensors edits, ``bool[batch, tokens, 1]`` or None for all, by the suffix of its parts."""


class LoReFTMethod(Method[LoReFT, ValueSite]):
    """``h + R^T ((W - R) h + b)`` with ``R, W: [rank, width]`` and ``b: [rank]``.

    ``R`` and ``W - R`` are computed in at least float32. With ``init: identity`` the difference is exactly zero.
    """

    def prepare(self, spec: LoReFT, sites: Sequence[ValueSite], build: Builder) -> Mapping[Sizes, Regions]:
        """Return the tokens to edit, once for each stack of layers, by the sizes of its values.

        Raises:
            GraftError: GC017 if `first` or `last` are set where values do not belong to tokens that the call passes,
                GC037 if a value has no batch axis.
        """
        regions: dict[Sizes, Regions] = {}
        batch = Batch(build)
        for site in sites:
            sizes = _sizes(batch.first(site.node, str(site.key)))
            if sizes not in regions:
                regions[sizes] = _regions(spec, site, sizes, build)
        return regions

    def insert(self, spec: LoReFT, site: ValueSite, shared: Mapping[Sizes, Regions], build: Builder) -> None:
        """Edit the value.

        Raises:
            GraftError: GC020 for a rank above the width, GC037 if the value has no batch axis.
        """
        if spec.rank > site.width:
            raise GraftError(
                "GC020",
                f"rank {spec.rank} is too large for {site.key}, whose width is {site.width}",
                place=Place(path="rank"),
                hint=f"use a rank of at most {site.width}",
            )
        value = build.value(site)
        batch = Batch(build)
        rows = batch.first(value, str(site.key))
        edited = rows
        for part, region in shared[_sizes(rows)].items():
            after = build.dropout(_edited(spec, site, rows, part, build), spec.dropout)
            edited = after if region is None else build.call(aten.where.self, region, after, edited, part="tokens")
        build.set_value(site, batch.home(edited, value))

    def repeats(self, spec: LoReFT) -> bool:
        """Return whether the initial values are drawn independently of each other."""
        return spec.init == "uniform"

    def fold(self, spec: LoReFT, site: ValueSite, tensors: Mapping[str, Tensor]) -> Fold:
        """Keep the adaptation in the graph, since it changes what layers read, and not how they read it."""
        return Keep("it edits values between layers, which no weight of the base computes")


def _edited(spec: LoReFT, site: ValueSite, rows: fx.Node, part: str, build: Builder) -> fx.Node:
    """Return the edited values ``[batch, ..., width]``, with the tensors that have the suffix ``part``."""
    wide = torch.promote_types(site.dtype, torch.float32)
    vectors = build.parameter(f"rotation{part}", (site.width, spec.rank), _reflections, dtype=wide)
    (rotation,) = trace(build, lambda raw: [orthonormal(raw)], [vectors], "rotation")
    if spec.init == "identity":
        weight = build.trained(f"W{part}", lambda: orthonormal(build.own_value(f"rotation{part}")))
    else:
        weight = build.parameter(f"W{part}", (spec.rank, site.width), uniform, dtype=wide)
    start = zeros if spec.init == "identity" else within(site.width**-0.5)
    bias = build.parameter(f"b{part}", (spec.rank,), start, dtype=site.dtype)
    difference = build.cast(build.call(aten.sub.Tensor, weight, rotation, part="difference"), site.dtype)
    inner = build.linear(rows, difference, bias, "edit")
    back = build.cast(build.call(aten.transpose.int, rotation, -1, -2, part="rotation"), site.dtype)
    return build.call(aten.add.Tensor, rows, build.linear(inner, back, None, "edit"), part="edit")


def _sizes(rows: fx.Node) -> Sizes:
    """Return the sizes of a value's axes except the last."""
    return tuple(expression(size) for size in rows.meta["val"].shape[:-1])


def _starts_with(node: fx.Node, sizes: Sizes) -> bool:
    """Return whether the first two axes of an input are those of a batch of tokens."""
    value = node.meta["val"]
    return isinstance(value, Tensor) and len(sizes) == 2 and tuple(map(expression, value.shape[:2])) == sizes


def _regions(spec: LoReFT, site: ValueSite, sizes: Sizes, build: Builder) -> Regions:
    """Return the tokens to edit of values with these ``[batch, tokens]`` sizes; later regions take precedence."""
    if not spec.first and not spec.last:
        return {"": None}
    call = partial(build.call, part="tokens")
    mask = token_mask(build, sizes)
    if mask is None:
        text = next((node for node in build.program.placeholders() if _starts_with(node, sizes)), None)
        if text is None:
            raise unsupported(site, "has no first or last tokens", "edit all of its values, without first and last")
        for _ in range(text.meta["val"].dim() - 2):
            text = call(aten.select.int, text, -1, 0)
        mask = call(aten.ones_like.default, text, dtype=torch.int64)
    real = call(aten.ne.Scalar, mask, 0)
    number = call(aten.cumsum.default, call(aten.to.dtype, real, torch.int64), 1)
    remaining = call(aten.sub.Tensor, call(aten.amax.default, number, [1], True), number)
    first = call(aten.logical_and.default, real, call(aten.le.Scalar, number, spec.first))
    last = call(aten.logical_and.default, real, call(aten.lt.Scalar, remaining, spec.last))
    if spec.untied:
        regions = {"_last": last, "_first": first}
    elif spec.first and spec.last:
        regions = {"": call(aten.logical_or.default, first, last)}
    else:
        regions = {"": first if spec.first else last}
    return {part: call(aten.unsqueeze.default, region, -1) for part, region in regions.items()}


def orthonormal(raw: Tensor) -> Tensor:
    """Return ``R: [..., rank, width]`` with orthonormal rows, the first rows of a product of Householder reflections.

    Column ``i`` of ``raw: [..., width, rank]`` has, below the diagonal, the vector ``v_i`` of the reflection
    ``I - 2 v_i v_i^T / |v_i|^2``; entry ``i`` of ``v_i`` is 1, and those above are 0. The product is ``I - V T V^T``,
    where the inverse of ``T`` is ``D + N``: ``D`` is diagonal with ``|v_i|^2 / 2``, and ``N`` is the part of ``V^T V``
    above the diagonal. Since ``D^-1 N`` is nilpotent, the geometric series for ``T`` is finite; each
    squaring doubles the number of its terms.
    """
    width, rank = raw.shape[-2:]
    identity = torch.eye(width, rank, dtype=raw.dtype, device=raw.device)
    small = identity[:rank]
    vectors = raw.tril(-1) + identity
    products = vectors.mT @ vectors
    scales = 2 / (vectors * vectors).sum(-2)
    power = -scales.unsqueeze(-1) * products.triu(1)
    series = small + power
    for _ in range((rank - 1).bit_length() - 1):
        power = power @ power
        series = series + power @ series
    triangle = series * scales.unsqueeze(-2)
    return (identity - vectors @ (triangle @ vectors[..., :rank, :].mT)).mT


def _reflections(tensor: Tensor, generator: torch.Generator) -> None:
    """Fill a tensor with the reflections of a random orthogonal matrix."""
    tensor.normal_(generator=generator)
    vectors, _ = torch.geqrf(tensor)
    tensor.copy_(vectors)
