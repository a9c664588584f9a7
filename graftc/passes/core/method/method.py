"""`Method`, the base class of PEFT methods: one subclass per method, in a file with the same name as its spec's."""

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
    """Base class of methods, which adapt sites according to a spec and fold the adaptation back.

    A subclass names its spec class and its site class, or a union of site classes: ``Method[LoRA, LinearSite]``. It
    need not know which operator, orientation or fusion a `LinearSite` hides, and changes the graph only through the
    Builder. Its claims are declared next to its spec class. It declares further capabilities by also deriving from
    classes in `graftc.passes.core.method.capabilities`.
    """

    spec_class: ClassVar[type[MethodSpec]]
    """The spec class that the method implements; its tag names the method. Default: the base's first type argument."""

    site_classes: ClassVar[tuple[type[Site], ...]] = (Site,)
    """The classes of the method's sites. Default: the base's second type argument. A method that claims other sites is
    refused when it is looked up, so its functions need not check their sites."""

    controller: ClassVar[type[Controller[Any]] | None] = None
    """The class that changes values between optimiser steps, if any."""

    objective: ClassVar[type[TensorObjective[Any]] | type[OutputObjective[Any]] | None] = None
    """The class of a term added to the loss, if any, computed from tensors or from the outputs of several passes."""

    stands_in: ClassVar[bool] = False
    """Whether everything that the method creates (trained copies, sums of base tensors and differences) replaces base
    tensors wherever they are read, including under tied names and before everything inserted at sites, so that the
    method always folds."""

    def repeats(self, spec: S) -> bool:
        """Return whether the insertion at a site depends only on the spec and the types of the site's own tensors.

        The same must hold for the initial values of the method's tensors, all of which must be created by
        `Builder.parameter`. If it does, only these tensors are created in layers that repeat another layer.
        """
        return False

    def reads_channels(self, spec: S) -> bool:
        """Return whether the method treats a convolution as more than a linear map over patches.

        This is the case if it distinguishes channels from kernel positions, or combines groups.
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
        """Create everything that all sites of the adaptation share; called once per adaptation and Program."""
        return None

    def applies(self, spec: S, site: Site) -> bool:
        """Return whether the method has anything to do at a site that its target selects.

        Other sites are skipped: maps without a bias, for example, if the method trains biases.

        Args:
            spec: the adaptation with the site's overrides applied.
            site: the site; a site that no method can adapt is an error unless it is skipped.
        """
        return True

    def remedy(self, spec: S) -> str | None:
        """Return a hint for the user if the method applies to none of the sites that the target selects."""
        return None

    @abstractmethod
    def insert(self, spec: S, site: P, shared: Any, build: Builder) -> None:
        """Adapt one site; called once per site and Program, inside ``build.on(site)``.

        Args:
            spec: the adaptation with the site's overrides applied.
            site: the site to adapt.
            shared: the result of `prepare`.
            build: the builder that creates the nodes and tensors.
        """

    @abstractmethod
    def fold(self, spec: S, site: P, tensors: Mapping[str, Tensor]) -> Fold:
        """Return one site's adaptation as a change to base tensors, or the reason why it cannot be folded.

        Args:
            spec: the adaptation with the site's overrides applied.
            site: the adapted site; only the site's sizes and name may be used.
            tensors: the site's own tensors and those that all sites share, by part, in float64.
        """


def _classes(site: Any) -> tuple[type[Site], ...]:
    """Return the classes in a site class or a union of site classes; none for a type variable."""
    if isinstance(site, UnionType):
        return get_args(site)
    return (site,) if isinstance(site, type) else ()
