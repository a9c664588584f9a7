"""Training of base tensors as they are: copies stand in for them."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, TypeVar

from torch import Tensor, fx

from graftc.passes.core.build.builder import Builder
from graftc.passes.core.method.method import Method
from graftc.passes.core.sites.sites import LinearSite, NormSite, ParameterSite, Site
from graftc.passes.core.weights.folds import Fold, StandIn
from graftc.specs.base import MethodSpec
from graftc.specs.methods.full import Full

S = TypeVar("S", bound=MethodSpec)
Stored = LinearSite | NormSite | ParameterSite
"""Sites with tensors of the base."""


class TrainedTensors(Method[S, Stored]):
    """The weight and the bias of a map, the scale and the shift of a norm, or a tensor as a whole, train as copies."""

    stands_in = True

    def applies(self, spec: S, site: Site) -> bool:
        """Where there is a tensor that some output needs."""
        return isinstance(site, LinearSite | NormSite | ParameterSite)

    def insert(self, spec: S, site: Stored, shared: Any, build: Builder) -> None:
        """Put trained copies in the place of the site's tensors.

        Raises:
            GraftError: GC021 where another adaptation trains them too.
        """
        overlay = partial(build.overlay, through=partial(self.read, spec, shared, build))
        if isinstance(site, LinearSite):
            for own in site.slices:
                overlay(own)
        elif isinstance(site, NormSite):
            for tensor in filter(None, (site.weight, site.bias)):
                overlay(tensor)
        else:
            overlay(site.tensor)

    def read(self, spec: S, shared: Any, build: Builder, trained: fx.Node) -> fx.Node:
        """What is read in the place of a tensor that trains: itself, or the same value."""
        return trained

    def fold(self, spec: S, site: Stored, tensors: Mapping[str, Tensor]) -> Fold:
        """The trained values take the places of the base's."""
        return StandIn()


class FullMethod(TrainedTensors[Full]):
    """`TrainedTensors` of all sites."""
