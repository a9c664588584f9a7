"""How scaling is inserted into a graph and folded back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from graftc.extend import Builder, Fold, LinearSite, Method, WeightFold
from graftc_scale.spec import Scale


def _ones(tensor: Tensor, generator: torch.Generator) -> None:
    tensor.fill_(1)


class ScaleMethod(Method[Scale, LinearSite]):
    """``y = l * (W x + b)`` with ``l: [out]``."""

    def insert(self, spec: Scale, site: LinearSite, shared: Any, build: Builder) -> None:
        """Multiply the site's own outputs by the vector."""
        scale = build.parameter("scale", (site.out_features,), _ones, dtype=site.dtype)
        build.set_output(site, build.call(torch.ops.aten.mul.Tensor, build.output(site), scale, part="scale"))

    def fold(self, spec: Scale, site: LinearSite, tensors: Mapping[str, Tensor]) -> Fold:
        """Scale the rows of the weight, and the bias where there is one."""
        scale = tensors["scale"]

        def apply(weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
            return scale[:, None] * weight, None if bias is None else scale * bias

        return WeightFold(apply)
