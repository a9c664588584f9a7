"""Houlsby adapters: two bottlenecks in every layer (Houlsby et al. 2019, arXiv:1902.00751)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from graftc.passes.core.build.builder import Builder
from graftc.passes.core.sites.site_slices import slices_of
from graftc.passes.core.sites.sites import LinearSite, NormSite, SublayerSite
from graftc.passes.core.weights.folds import Fold, StandIn
from graftc.passes.methods.bottleneck import BottleneckAdapter
from graftc.specs.methods.houlsby import Houlsby


class HoulsbyMethod(BottleneckAdapter[Houlsby]):
    """``a + A(a)`` on a sublayer's branch; copies of the base's normalisations are also trained."""

    site_classes = (SublayerSite, NormSite)

    def insert(self, spec: Houlsby, site: LinearSite | SublayerSite | NormSite, shared: Any, build: Builder) -> None:
        """Insert the adapter, or replace a normalisation's scale and shift with trained copies.

        Raises:
            GraftError: GC020 if the bottleneck would have a width of zero, GC021 if another adaptation trains a norm.
        """
        if not isinstance(site, NormSite):
            super().insert(spec, site, shared, build)
            return
        for own in slices_of(site, build.store):
            build.overlay(own)

    def fold(self, spec: Houlsby, site: LinearSite | SublayerSite | NormSite, tensors: Mapping[str, Tensor]) -> Fold:
        """Keep the adapters in the graph; replace the base's normalisations with the trained ones."""
        return StandIn() if isinstance(site, NormSite) else super().fold(spec, site, tensors)
