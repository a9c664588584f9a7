"""BitFit: training only the biases (Ben-Zaken et al. 2022, arXiv:2106.10199)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from graftc.passes.core.build.builder import Builder
from graftc.passes.core.method.lowrank import zeros
from graftc.passes.core.method.method import Method
from graftc.passes.core.sites.site_slices import slices_of
from graftc.passes.core.sites.sites import ExpertsSite, LinearSite, NormSite, ParameterSite, Site
from graftc.passes.core.weights.folds import Fold, StandIn, WeightFold
from graftc.specs.methods.bitfit import BitFit


class BitFitMethod(Method[BitFit, LinearSite | NormSite | ParameterSite]):
    """Trains copies of the base's biases; with `add_missing`, adds ``c: [out]`` to linear maps without a bias."""

    def applies(self, spec: BitFit, site: Site) -> bool:
        """Return whether the site has a bias or will be given one; output heads are excluded."""
        if site.is_head:
            return False
        if isinstance(site, LinearSite):
            return site.use.bias is not None or (spec.add_missing and not isinstance(site, ExpertsSite))
        if isinstance(site, NormSite):
            return site.bias is not None
        return isinstance(site, ParameterSite) and site.tensor.rpartition(".")[2].endswith("bias")

    def remedy(self, spec: BitFit) -> str | None:
        """Suggest `add_missing`, unless the spec already sets it."""
        return None if spec.add_missing else "set add_missing: true to add a bias, initially zero, to maps without one"

    def insert(self, spec: BitFit, site: LinearSite | NormSite | ParameterSite, shared: Any, build: Builder) -> None:
        """Replace the bias with a trained copy, or add a bias.

        Raises:
            GraftError: GC021 if another adaptation also trains the bias.
        """
        if isinstance(site, LinearSite) and site.own_bias is None:
            build.add(site, build.parameter("added", (site.out_features,), zeros, dtype=site.dtype), "bias")
        else:
            build.overlay(slices_of(site, build.store)[-1])

    def fold(self, spec: BitFit, site: LinearSite | NormSite | ParameterSite, tensors: Mapping[str, Tensor]) -> Fold:
        """Replace the base's biases with trained copies; fold an added bias into the map's bias."""
        if "added" not in tensors:
            return StandIn()

        def apply(weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
            return weight, tensors["added"] if bias is None else bias + tensors["added"]

        return WeightFold(apply)
