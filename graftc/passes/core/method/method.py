"""`Method`, the base class for the code of a PEFT method: one subclass per method, in a file of the spec's name."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from types import UnionType
from typing import Any, ClassVar, Generic, TypeVar, get_args, get_origin

from torch import Tensor

from graftc.passes.core.build.builder import Builder
from graftc.passes.core.method.steering import Controller, OutputObjective, TensorObjective
from graftc.passes.core.sites.sites import Site
from graftc.passes.core.weights.folds import Fold
from graftc.specs.base import MethodSpec

S = TypeVar("S", bound=MethodSpec)
P = TypeVar("P", bound=Site)


class Method(ABC, Generic[S, P]):
    """Adapts sites as a spec says, and folds the adaptation back.

    A subclass names its spec class and the class of its sites, or a union of these: ``Method[LoRA, LinearSite]``. It
    never knows which operator, orientation or fusion a `LinearSite` hides, and changes a graph through the Builder
    only. What it claims stands beside its spec class; what else it can, it says by deriving from classes of
    `graftc.passes.core.method.capabilities`.
    """

    spec_class: ClassVar[type[MethodSpec]]
    """The spec that this class implements; its tag names the method. By default the first argument of the base."""

    site_classes: ClassVar[tuple[type[Site], ...]] = (Site,)
    """What its sites are. By default the second argument of the base; claims of other sites are refused when the method
    is looked up, so that no function of a method has to check."""

    controller: ClassVar[type[Controller[Any]] | None] = None
    """What changes values between optimiser steps, if anything does."""

    objective: ClassVar[type[TensorObjective[Any]] | type[OutputObjective[Any]] | None] = None
    """A term beside the loss, if there is one: of tensors, or of the outputs of several passes."""

    stands_in: ClassVar[bool] = False
    """Whether all that it makes stands in for base tensors wherever they are read, under tied names too and below
    everything that is inserted at sites, so that it always folds: copies that train, sums with differences."""

    def repeats(self, spec: S) -> bool:
        """Return whether what is inserted at a site follows from the spec and the types of its own tensors alone.

        This includes the first values of the method's tensors, and everything has to be made by `Builder.parameter`. In
        layers that repeat another one, only these tensors are then created.
        """
        return False

    def reads_channels(self, spec: S) -> bool:
        """Return whether the method treats a convolution as more than a map of patches.

        This is so if its channels and the points of its kernel count separately, or if its groups are combined.
        """
        return False

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        for base in cls.__dict__.get("__orig_bases__", ()):
            origin = get_origin(base)
            if not (isinstance(origin, type) and issubclass(origin, Method)):
                continue
            spec, *sites = get_args(base)
            if isinstance(spec, type) and "spec_class" not in cls.__dict__:
                cls.spec_class = spec
            if origin is Method and "site_classes" not in cls.__dict__:
                cls.site_classes = tuple(c for site in sites for c in _classes(site)) or (Site,)

    def prepare(self, spec: S, sites: Sequence[P], build: Builder) -> Any:
        """Make what all sites of the adaptation share; called once per adaptation and Program."""
        return None

    def applies(self, spec: S, site: Site) -> bool:
        """Return whether the method has anything to do at a site that its target selects.

        Other sites are skipped, such as maps without a bias if biases train.

        Args:
            spec: the adaptation with the site's overrides applied.
            site: the site; it may be one that no method can adapt, which is an error unless it is skipped.
        """
        return True

    def remedy(self, spec: S) -> str | None:
        """Return what to do if the method has nothing to do at any site that the target selects."""
        return None

    @abstractmethod
    def insert(self, spec: S, site: P, shared: Any, build: Builder) -> None:
        """Adapt one site; called once per site and Program, inside ``build.on(site)``.

        Args:
            spec: the adaptation with the site's overrides applied.
            site: the site to adapt.
            shared: the result of `prepare`.
            build: the builder that makes the nodes and tensors.
        """

    @abstractmethod
    def fold(self, spec: S, site: P, tensors: Mapping[str, Tensor]) -> Fold:
        """Return the adaptation of one site as a change of base tensors, or the reason why it has to stay.

        Args:
            spec: the adaptation with the site's overrides applied.
            site: the adapted site; only its sizes and name may be used.
            tensors: the site's own tensors by part, float64, and those that all sites share.
        """


def _classes(site: Any) -> tuple[type[Site], ...]:
    """Return the classes of a site, or of a union of them; none if it is a type variable."""
    if isinstance(site, UnionType):
        return get_args(site)
    return (site,) if isinstance(site, type) else ()
