"""Method: the code of a PEFT method. One subclass per method, in a file of the spec's name."""

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
        """Whether what it inserts at a site, and how its tensors begin, follow from the spec and from the types of the
        site's own tensors alone, and all that it makes is made by `Builder.parameter`. In layers that repeat another
        one, nothing but these tensors is made then."""
        return False

    def reads_channels(self, spec: S) -> bool:
        """Whether a convolution is more to it than a map of patches: its channels and the points of its kernel count
        apart, or its groups meet."""
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
    def insert(self, spec: S, site: P, shared: Any, build: Builder) -> None:
        """Adapt one site; called once per site and Program, inside ``build.on(site)``.

        Args:
            spec: the adaptation with the site's overrides applied.
            site: where.
            shared: what `prepare` returned.
            build: makes the nodes and tensors.
        """

    @abstractmethod
    def fold(self, spec: S, site: P, tensors: Mapping[str, Tensor]) -> Fold:
        """The adaptation of one site as a change of base tensors, or the reason why it has to stay.

        Args:
            spec: the adaptation with the site's overrides applied.
            site: where; only its sizes and name may be used.
            tensors: the site's own tensors by part, float64, and those that all sites share.
        """


def _classes(site: Any) -> tuple[type[Site], ...]:
    """The classes of a site, or of a union of them; none where it is a variable."""
    if isinstance(site, UnionType):
        return get_args(site)
    return (site,) if isinstance(site, type) else ()
