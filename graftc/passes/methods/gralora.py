"""GraLoRA: low-rank updates of a weight's blocks (Jung et al. 2025, arXiv:2505.20355)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, fx

from graftc.passes.core.build.builder import Builder
from graftc.passes.core.method.capabilities import Exchangeable
from graftc.passes.core.method.lowrank import added, check_divides, check_rank, uniform, within, zeros
from graftc.passes.core.method.method import Method
from graftc.passes.core.sites.sites import LinearSite
from graftc.passes.core.sites.uses import Dense
from graftc.passes.core.weights.folds import Fold, weight_fold
from graftc.passes.methods.bases.low_rank import kept
from graftc.specs.methods.gralora import GraLoRA
from graftc.specs.methods.lora import LoRA

aten = torch.ops.aten


class GraLoRAMethod(Method[GraLoRA, LinearSite], Exchangeable[GraLoRA]):
    """``y = W x + b + s U drop(x)`` with a low-rank product in every block of ``U``, and ``s`` as in the spec.

    With ``q = rank / k``, the block of ``U`` in row ``i`` and column ``j`` is the transpose of ``A[j, :, i q : (i + 1)
    q] B[i, j q : (j + 1) q]``. A dense layer multiplies part by part. Other maps, and rows of a batch that have factors
    of their own, use the same update as one product of rank ``k * rank``, whose factors are mostly zeros.
    """

    def insert(self, spec: GraLoRA, site: LinearSite, shared: Any, build: Builder) -> None:
        """Insert the branch.

        Raises:
            GraftError: GC002 when ``k`` does not divide a side of the site, GC020 when a rank exceeds ``min(in, out)``
                without ``excess_rank``.
        """
        check_divides(site, "k", spec.k)
        for rank in () if spec.excess_rank else (spec.rank, spec.hybrid_rank):
            check_rank(site, rank)
        k, rank, hybrid = spec.k, spec.rank, spec.hybrid_rank
        shapes: dict[str, tuple[int, ...]]
        shapes = {"A": (k, site.in_features // k, rank), "B": (k, rank, site.out_features // k)}
        if hybrid:
            shapes |= {"A_hybrid": (hybrid, site.in_features), "B_hybrid": (site.out_features, hybrid)}
        starts = {"A": within(1 / math.sqrt(site.in_features // k)), "A_hybrid": uniform}
        if spec.init == "random":
            starts |= {"B": within(1 / math.sqrt(rank)), "B_hybrid": uniform}
        nodes = {
            part: build.parameter(part, (*site.leading, *shape), starts.get(part, zeros), dtype=site.dtype)
            for part, shape in shapes.items()
        }
        x = build.dropout(build.input(site), spec.dropout)
        build.add(site, _blocks(spec, site, x, nodes["A"], nodes["B"], build))
        if hybrid:
            build.add(site, build.low_rank(site, x, nodes["A_hybrid"], nodes["B_hybrid"], spec.scaling))

    def repeats(self, spec: GraLoRA) -> bool:
        """Return True, since the insertion depends only on the spec and the types of the site's tensors."""
        return True

    def fold(self, spec: GraLoRA, site: LinearSite, tensors: Mapping[str, Tensor]) -> Fold:
        """Fold the blocks into the weight, and the update of the whole weight if there is one."""

        def change(weight: Tensor) -> Tensor:
            a, b = _split(tensors["A"], -1, spec.k), _split(tensors["B"], -2, spec.k)
            blocks = torch.einsum("...jciq,...ijqo->...iojc", a, b).reshape(weight.shape)
            weight = torch.add(weight, blocks, alpha=spec.scaling)
            if "A_hybrid" in tensors:
                weight = added(weight, tensors["B_hybrid"], tensors["A_hybrid"], spec.scaling)
            return weight

        return weight_fold(change)

    def exchangeable(self, spec: GraLoRA, size: int) -> LoRA:
        """Return a plain LoRA of this rank whose scale is 1."""
        return LoRA(rank=size, alpha=size, excess_rank=True, **kept(spec, "name", "target", "dtype"))

    def exchanged(self, spec: GraLoRA, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return factors of rank ``k * rank + hybrid_rank``, with the scale in ``B``."""
        a, b = tensors["A"], _split(tensors["B"], -2, spec.k)
        unit = torch.eye(spec.k, dtype=a.dtype, device=a.device)
        down = torch.einsum("...jcr,jn->...jrnc", a, unit).flatten(-4, -3).flatten(-2)
        up = torch.einsum("...ijqo,in->...iojnq", b, unit).flatten(-3).flatten(-3, -2)
        if "A_hybrid" in tensors:
            down, up = torch.cat([down, tensors["A_hybrid"]], -2), torch.cat([up, tensors["B_hybrid"]], -1)
        return {"A": down, "B": up * spec.scaling}


def _split(tensor: Tensor, axis: int, k: int) -> Tensor:
    return cast("Tensor", aten.unflatten.int(tensor, axis, [k, tensor.shape[axis] // k]))


def _blocks(spec: GraLoRA, site: LinearSite, x: fx.Node, a: fx.Node, b: fx.Node, build: Builder) -> fx.Node:
    """Return ``s U x``, as `Builder.low_rank` does."""
    k, rank = spec.k, spec.rank
    b = build.call(aten.unflatten.int, b, -2, [k, rank // k], part="parts")
    if isinstance(site.use, Dense) and a.meta["val"].dim() == 3:
        parts = build.call(aten.unflatten.int, x, -1, [k, site.in_features // k], part="parts")
        hidden = build.call(aten.einsum.default, "...jc,jcr->...jr", [parts, a], part="down")
        if spec.scaling != 1:
            hidden = build.call(aten.mul.Tensor, hidden, spec.scaling, part="scale")
        hidden = build.call(aten.unflatten.int, hidden, -1, [k, rank // k], part="parts")
        result = build.call(aten.einsum.default, "...jiq,ijqo->...io", [hidden, b], part="up")
        return build.call(aten.flatten.using_ints, result, -2, part="parts")
    down = build.call(aten.movedim.int, a, -1, -3, part="down")
    down = build.call(aten.movedim.int, _diagonal(build, down, k), -3, -2, part="down")
    down = build.call(aten.flatten.using_ints, down, -3, -2, part="down")
    up = build.call(aten.movedim.int, b, -1, -4, part="up")
    up = build.call(aten.movedim.int, up, -3, -2, part="up")
    up = build.call(aten.movedim.int, _diagonal(build, up, k), -2, -4, part="up")
    up = build.call(aten.flatten.using_ints, up, -2, part="up")
    return build.low_rank(site, x, down, build.call(aten.flatten.using_ints, up, -3, -2, part="up"), spec.scaling)


def _diagonal(build: Builder, node: fx.Node, k: int) -> fx.Node:
    """Return ``[..., k, width]`` as ``[..., k, k * width]``: row ``i`` at its ``i``-th part, and zeros elsewhere."""
    width = int(node.meta["val"].shape[-1])
    padded = build.call(aten.constant_pad_nd.default, node, [0, k * width], part="diagonal")
    flat = build.call(aten.flatten.using_ints, padded, -2, part="diagonal")
    own = build.call(aten.slice.Tensor, flat, -1, 0, k * k * width, part="diagonal")
    return build.call(aten.unflatten.int, own, -1, [k, k * width], part="diagonal")
