"""Tuning of normalisations (Qi et al. 2022, arXiv:2211.08682; Zhao et al. 2023, arXiv:2312.11420)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from graftc.passes.core.build.builder import Builder
from graftc.passes.core.method.method import Method
from graftc.passes.core.sites.sites import NormSite
from graftc.passes.core.weights.folds import Fold, StandIn
from graftc.specs.methods.norms import Norms


class NormsMethod(Method[Norms, NormSite]):
    """The scale and the shift of a normalisation, ``[width]`` each, train as copies of the base's own."""

    def insert(self, spec: Norms, site: NormSite, shared: Any, build: Builder) -> None:
        """Put trained copies in the place of the scale and of the shift, where there is one.

        Raises:
            GraftError: GC021 where another adaptation trains them too.
        """
        for tensor in filter(None, (site.weight, site.bias)):
            build.overlay(tensor)

    def fold(self, spec: Norms, site: NormSite, tensors: Mapping[str, Tensor]) -> Fold:
        """The trained values take the places of the base's."""
        return StandIn()
