"""(IA)^3: vectors that rescale activations (Liu et al. 2022, arXiv:2205.05638)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from graftc.passes.core.build.builder import Builder
from graftc.passes.core.method.method import Method
from graftc.passes.core.sites.sites import LinearSite, Site
from graftc.passes.core.weights.folds import Fold, WeightFold
from graftc.specs.methods.ia3 import IA3

aten = torch.ops.aten


class IA3Method(Method[IA3, LinearSite]):
    """``y = l * (W x + b)`` with ``l: [out]``, or ``y = W (l * x) + b`` with ``l: [in]``.

    A vector on keys or values acts before heads are split and before a rotary embedding, so it folds into rows of ``W``
    and ``b``. A vector on inner activations acts on the input of the projection back, which is the same as scaling the
    result of the activation function, or of the gated product; it folds into columns of ``W`` and leaves ``b``
    unchanged.

    On one site, adaptations are functions of ``(W, b)``, applied one after the other: LoRA followed by a vector on the
    input is ``(W + B A) diag(l)``, the reverse order is ``W diag(l) + B A``.
    """

    def insert(self, spec: IA3, site: LinearSite, shared: Any, build: Builder) -> None:
        """Multiply what the site gives, or what it reads, by the vector.

        Raises:
            GraftError: GC017 for the input of a convolution over more than a point.
        """
        inward = _scales_input(spec, site)
        size = site.in_features if inward else site.out_features
        scale = build.parameter("l", (size,), _ones, dtype=site.dtype)
        if inward:
            build.scale_input(site, scale)
        else:
            rows = build.per_row(site, scale)
            build.set_output(site, build.call(aten.mul.Tensor, build.output(site), rows, part="scale"))

    def fold(self, spec: IA3, site: LinearSite, tensors: Mapping[str, Tensor]) -> Fold:
        """``W' = diag(l) W`` and ``b' = l * b``, or ``W' = W diag(l)``."""
        scale, inward = tensors["l"], _scales_input(spec, site)

        def apply(weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
            if inward:
                return weight * scale, bias
            return weight * scale[:, None], None if bias is None else bias * scale

        return WeightFold(apply)


def _ones(tensor: Tensor, generator: torch.Generator) -> None:
    tensor.fill_(1)


def _scales_input(spec: IA3, site: Site) -> bool:
    return spec.side_at(site.roles) == "input"
