"""Direct training of base tensors, through copies that replace them."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, TypeVar

from torch import Tensor, fx

from graftc.passes.core.build.builder import Builder
from graftc.passes.core.method.method import Method
from graftc.passes.core.sites.site_slices import slices_of
from graftc.passes.core.sites.sites import LinearSite, NormSite, ParameterSite, Site
from graftc.passes.core.weights.folds import Fold, StandIn
from graftc.specs.base import MethodSpec
from graftc.specs.methods.full import Full

S = TypeVar("S", bound=MethodSpec)
Stored = LinearSite | NormSite | ParameterSite
"""Sites that have base tensors."""


class TrainedTensors(Method[S, Stored]):
    """Trains copies of a map's weight and bias, of a norm's scale and shift, or of a whole tensor."""

    stands_in = True

    def applies(self, spec: S, site: Site) -> bool:
        """Return whether the site is a map, a norm or a parameter."""
        return isinstance(site, LinearSite | NormSite | ParameterSite)

    def insert(self, spec: S, site: Stored, shared: Any, build: Builder) -> None:
        """Replace the site's tensors with trained copies.

        Raises:
            GraftError: GC021 if another adaptation also trains them.
        """
        for own in slices_of(site, build.store):
            build.overlay(own, through=partial(self.read, spec, shared, build))

    def read(self, spec: S, shared: Any, build: Builder, trained: fx.Node) -> fx.Node:
        """Return the node to read in place of a base tensor: the trained tensor, or a node with the same value."""
        return trained

    def fold(self, spec: S, site: Stored, tensors: Mapping[str, Tensor]) -> Fold:
        """Replace the base's tensors with the trained copies."""
        return StandIn()


class FullMethod(TrainedTensors[Full]):
    """`TrainedTensors` at all sites."""
