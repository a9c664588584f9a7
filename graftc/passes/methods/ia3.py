"""(IA)^3: vectors that rescale activations (Liu et al. 2022, arXiv:2205.05638)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from graftc.passes.core.build.builder import Builder
from graftc.passes.core.method.capabilities import Exchangeable, RowWise
from graftc.passes.core.method.lowrank import ones
from graftc.passes.core.method.method import Method
from graftc.passes.core.sites.sites import LinearSite, unsupported
from graftc.passes.core.weights.folds import Fold, WeightFold
from graftc.passes.core.weights.weight_slice import Layout
from graftc.specs.methods.ia3 import IA3

aten = torch.ops.aten


class IA3Method(Method[IA3, LinearSite], RowWise[IA3], Exchangeable[IA3]):
    """``y = l * (W x + b)`` with ``l: [out]``, or ``y = W (l * x) + b`` with ``l: [in]``.

    A vector on keys or values acts before heads are split and before a rotary embedding, so it folds into rows of ``W``
    and ``b``. A vector on inner activations acts on the input of the down projection, which is equivalent to scaling
    the result of the activation function, or of the gated product; it folds into columns of ``W`` and leaves ``b``
    unchanged.

    At one site, adaptations are functions of ``(W, b)``, applied one after the other: LoRA followed by a vector on the
    input is ``(W + B A) diag(l)``; the reverse order is ``W diag(l) + B A``.
    """

    def insert(self, spec: IA3, site: LinearSite, shared: Any, build: Builder) -> None:
        """Multiply the site's output or its input by the vector.

        Raises:
            GraftError: GC017 for the input of an embedding table, which consists of indices, and for the input of some
                rows of a grouped convolution.
        """
        inward = spec.side_at(site.roles) == "input"
        size = site.use.entries if inward else site.out_features
        scale = build.parameter("l", (size,), ones, dtype=site.dtype)
        if inward:
            if site.use.grouped and not site.columns.whole:
                raise unsupported(site, "is part of a grouped convolution and does not have its own input", None)
            build.scale_input(site, scale)
        else:
            rows = build.per_row(site, scale)
            build.set_output(site, build.call(aten.mul.Tensor, build.output(site), rows, part="scale"))

    def fold(self, spec: IA3, site: LinearSite, tensors: Mapping[str, Tensor]) -> Fold:
        """Fold the vector into the weight: ``W' = diag(l) W`` and ``b' = l * b``, or ``W' = W diag(l)``."""
        scale, inward = tensors["l"], spec.side_at(site.roles) == "input"

        def apply(weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
            if inward:
                return _scaled_columns(weight, scale, site), bias
            return weight * scale[:, None], None if bias is None else bias * scale

        return WeightFold(apply)

    def repeats(self, spec: IA3) -> bool:
        """Return True, since the insertion depends only on the spec and the types of the site's tensors."""
        return True

    def reads_channels(self, spec: IA3) -> bool:
        """Return whether the vector may scale the input, which it does channel by channel in a convolution."""
        return spec.side != "output"

    def exchangeable(self, spec: IA3, size: int) -> IA3:
        """Return the spec, since the vectors have the sizes of the base."""
        return spec

    def row_axes(self, spec: IA3) -> Mapping[str, int]:
        """Return the row axis of ``l``, unless the spec always scales inputs."""
        return {} if spec.side == "input" else {"l": -1}

    def standing_alone(self, spec: IA3, roles: Sequence[str]) -> IA3:
        """Return the spec with ``side`` set to the side that the roles determine."""
        return spec.model_copy(update={"side": spec.side_at(roles)})


def _scaled_columns(weight: Tensor, scale: Tensor, site: LinearSite) -> Tensor:
    """Scale the columns of a weight.

    In a convolution, a channel's scale applies to all points of a patch, and each group of rows reads its own channels.
    """
    if site.own.layout is not Layout.KERNEL:
        return weight * scale
    channels = site.own.shape[1]
    groups, points = scale.shape[-1] // channels, weight.shape[-1] // channels
    wide = scale.reshape(groups, channels, 1).expand(groups, channels, points).reshape(groups, 1, -1)
    return (weight.reshape(groups, -1, weight.shape[-1]) * wide).reshape(weight.shape)
