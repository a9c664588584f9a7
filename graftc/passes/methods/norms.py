"""Tuning normalisation layers (Qi et al. 2022, arXiv:2211.08682; Zhao et al. 2023, arXiv:2312.11420)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from graftc.passes.core.build.builder import Builder
from graftc.passes.core.method.method import Method
from graftc.passes.core.sites.site_slices import slices_of
from graftc.passes.core.sites.sites import NormSite
from graftc.passes.core.weights.folds import Fold, StandIn
from graftc.specs.methods.norms import Norms


class NormsMethod(Method[Norms, NormSite]):
    """Trains copies of a normalisation's scale and shift, ``[width]`` each."""

    def insert(self, spec: Norms, site: NormSite, shared: Any, build: Builder) -> None:
        """Replace the scale, and the shift if there is one, with trained copies.

        Raises:
            GraftError: GC021 if another adaptation also trains them.
        """
        for own in slices_of(site, build.store):
            build.overlay(own)

    def fold(self, spec: Norms, site: NormSite, tensors: Mapping[str, Tensor]) -> Fold:
        """Replace the base's tensors with the trained copies."""
        return StandIn()
