"""Method: the code of a PEFT method. One subclass per method, in a file of the spec's name."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Generic, TypeVar

from torch import Tensor

from graftc.passes.core.build.builder import Builder
from graftc.passes.core.method.scoring import Scoring
from graftc.passes.core.method.stages import Advance
from graftc.passes.core.method.steering import Controller, OutputObjective, Place, TensorObjective
from graftc.passes.core.sites.sites import Site
from graftc.passes.core.weights.folds import Fold
from graftc.specs.base import MethodSpec
from graftc.specs.errors.diagnostics import GraftError

S = TypeVar("S", bound=MethodSpec)


class Method(ABC, Generic[S]):
    """Adapts sites as a spec says, and folds the adaptation back.

    A method never knows which operator, orientation or fusion a `LinearSite` hides, and changes a graph through the
    Builder only. What it claims stands beside its spec class.
    """

    spec_class: ClassVar[type[MethodSpec]]
    """The spec that this class implements; its tag names the method."""

    controller: ClassVar[type[Controller[Any]] | None] = None
    """What changes values between optimiser steps, if anything does."""

    objective: ClassVar[type[TensorObjective[Any]] | type[OutputObjective[Any]] | None] = None
    """A term beside the loss, if there is one: of tensors, or of the outputs of several passes."""

    stands_in: ClassVar[bool] = False
    """Whether all that it makes stands in for base tensors wherever they are read, under tied names too and below
    everything that is inserted at sites, so that it always folds: copies that train, sums with differences."""

    def prepare(self, spec: S, sites: Sequence[Site], build: Builder) -> Any:
        """Make what all sites of the adaptation share; called once per adaptation and Program."""
        return None

    def applies(self, spec: S, site: Site) -> bool:
        """Whether there is something for the method at a site that its target selects. Others are passed over, as maps
        without a bias are where biases train.

        Args:
            spec: the adaptation with the site's overrides applied.
            site: where; it may be one that no method can adapt, which is an error unless it is passed over.
        """
        return True

    def remedy(self, spec: S) -> str | None:
        """What to do where no site that the target selects has anything for the method."""
        return None

    @abstractmethod
    def insert(self, spec: S, site: Site, shared: Any, build: Builder) -> None:
        """Adapt one site; called once per site and Program, inside ``build.on(site)``.

        Args:
            spec: the adaptation with the site's overrides applied.
            site: where.
            shared: what `prepare` returned.
            build: makes the nodes and tensors.
        """

    @abstractmethod
    def fold(self, spec: S, site: Site, tensors: Mapping[str, Tensor]) -> Fold:
        """The adaptation of one site as a change of base tensors, or the reason why it has to stay.

        Args:
            spec: the adaptation with the site's overrides applied.
            site: where; only its sizes and name may be used.
            tensors: the site's own tensors by part, float64, and those that all sites share.
        """

    def scoring(self, spec: S) -> Scoring | None:
        """How examples score entries, where they choose what trains; None where they have no say."""
        return None

    def selected(self, spec: S, places: Sequence[Place[S]], scores: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The tensors of the adaptation, by their Store names, with what scores choose.

        Args:
            spec: the adaptation without its overrides applied.
            places: every adapted place.
            scores: of every entry of `scored`, by the tensors' Store names, in their shapes.
        """
        raise NotImplementedError

    def scored(self, places: Sequence[Place[S]]) -> Sequence[str]:
        """Store names of the base's tensors that `selected` wants the scores of."""
        return ()

    def stages(self, spec: S) -> int:
        """How many trainings the method takes."""
        return 1

    def advance(self, spec: S, places: Sequence[Place[S]], shared: Mapping[str, Tensor]) -> Advance[S]:
        """What the next training starts from, after the one that ``spec`` is for; its spec says that it is the next.

        Args:
            spec: the adaptation without its overrides applied.
            places: every adapted place with its live tensors.
            shared: tensors of the adaptation as a whole, by part.
        """
        raise NotImplementedError

    def deployed(self, spec: S, places: Sequence[Place[S]]) -> int | None:
        """How many elements have to ship beside the base after all trainings, where these are not those of its
        parameters; None where they are.

        Args:
            spec: the adaptation without its overrides applied.
            places: every adapted place with its tensors, which may be on the meta device.
        """
        return None

    def live_ranks(self, spec: S, tensors: Mapping[str, Tensor]) -> Tensor | None:
        """Which ranks of one site have an effect, ``bool[..., rank]``; None for a method whose ranks all have.

        Args:
            spec: the adaptation with the site's overrides applied.
            tensors: the site's own tensors by part, and those that all sites share.
        """
        return None

    def deploy_rank(self, spec: S, shared: Mapping[str, Tensor], rank: int) -> None:
        """Choose the rank that the adaptation has in eval mode and folds at, where the method can.

        Raises:
            GraftError: GC055 where it cannot, or not at this rank.
        """
        raise GraftError("GC055", f"{spec.method} has one rank, which is that of its spec")

    def collapse(self, spec: S) -> MethodSpec | None:
        """What the adaptation is deployed as where it does not fold: a simpler adaptation of the same name and places,
        or None where it is deployed as it was trained.

        Args:
            spec: the adaptation without its overrides applied.
        """
        return None

    def collapsed(self, spec: S, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The tensors of one site of what `collapse` gives, by part.

        Args:
            spec: the adaptation with the site's overrides applied.
            tensors: the site's own tensors by part, float64, and those that all sites share; on the meta device where
                only sizes are asked for.
        """
        return tensors
