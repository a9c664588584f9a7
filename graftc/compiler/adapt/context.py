"""The state of the passes that adapt one Program: their inputs and their results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from graftc.compiler.capture.capture import Capture
from graftc.compiler.capture.request import CaptureRequest
from graftc.compiler.compilation import Compilation
from graftc.compiler.resolution import Places
from graftc.compiler.resolve.called_sites import CalledSites
from graftc.compiler.resolve.embeds import Plan
from graftc.compiler.resolve.resolver import Resolved, Resolver
from graftc.compiler.resolve.sitetable import BlockedSite
from graftc.compiler.roles.structure import Structure
from graftc.passes.core.build.builder import Builder
from graftc.passes.core.build.initial import Initial, ParameterStart
from graftc.passes.core.build.nodes import Seams
from graftc.passes.core.ir.program import Program
from graftc.passes.core.pass_context import Findings, PassHost
from graftc.passes.core.sites.sites import AttentionSite, ParameterSite, Site, SiteKey, ValueSite
from graftc.passes.core.weights.store import Store
from graftc.specs.document import Spec


@dataclass
class Work:
    """A signature of a Compilation while it is being built.

    Attributes:
        compilation: the Compilation that it belongs to, without the signature.
        request: the calls to the source model that it is for, in train mode.
        controls: additional inputs, with which a call chooses among adaptations.
        places: the places where the first signature is adapted; None for the first signature itself.
        initial: the source of values for new tensors.
        parts: the inserted tensors, by adaptation, site and part.
        notes: readable notes on what capturing had to change, except for those that the Compilation already has.
    """

    compilation: Compilation
    request: CaptureRequest
    controls: Sequence[str]
    places: Places | None
    initial: Initial
    parts: dict[str, dict[SiteKey | None, dict[str, str]]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def enter(self, owner: str, parts: Mapping[SiteKey | None, dict[str, str]]) -> None:
        """Record the tensors of an adaptation, by site and part."""
        self.parts.setdefault(owner, {}).update(parts)


@dataclass
class Adapting(PassHost):
    """A Program while it is being adapted.

    Attributes:
        work: the work on the Program's signature.
        request: the request for the capture.
        capture: the result of the request.
        places: the places to adapt: those of the first signature, or of the same signature in train mode; None if the
            spec's targets decide.
        called: whether equal layers call functions; otherwise every layer is written out.
        base: the Program to adapt, which stays unchanged.
        captures: the captures from which the Program was built.
        resolver, structure: its sites and its roles, once they are known.
        resolved, trained: the adaptations with their sites, and the parameters that train in place, once known.
        plan: the virtual tokens, by the token-id input whose sequence they lengthen.
        findings: the findings of plugins' passes.
        prepared: the objects that methods created for all sites of an adaptation, by the adaptation's name; only those
            without nodes.
        starts: the initial values of the created parameters, by name.
    """

    work: Work
    request: CaptureRequest
    capture: Capture
    places: Places | Adapting | None
    called: bool = False
    base: Program = field(init=False)
    captures: list[Capture] = field(init=False)
    resolver: Resolver = field(init=False)
    structure: Structure = field(init=False)
    resolved: list[Resolved] = field(default_factory=list)
    trained: list[ParameterSite] = field(default_factory=list)
    plan: Plan = field(default_factory=dict)
    findings: Findings = field(default_factory=Findings)
    prepared: dict[str, Any] = field(default_factory=dict)
    starts: dict[str, ParameterStart] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.base = self.capture.traced if self.called else self.capture.program
        self.captures = [self.capture]

    @property
    def compilation(self) -> Compilation:
        """The Compilation, without the signature that is being built."""
        return self.work.compilation

    @property
    def store(self) -> Store:
        """The Store with every tensor."""
        return self.compilation.store

    @property
    def requested_spec(self) -> Spec:
        """The user's spec."""
        return self.compilation.spec

    @property
    def every_site(self) -> Sequence[Site]:
        """Every site of the Program that a method can adapt."""
        every = (site for sites in self.resolver.table.entries for site in sites)
        return [site for site in every if not isinstance(site, BlockedSite)]

    @property
    def adapted_sites(self) -> Mapping[str, Sequence[Site]]:
        """Each adaptation's sites, by its name."""
        return {item.name: [site for site, _ in item.sites] for item in self.resolved}

    def inserting(self, program: Program, owner: str) -> Builder:
        """Return a builder that inserts nodes owned by ``owner``."""
        return self.builder(program, owner, owner)

    @property
    def attentions(self) -> tuple[AttentionSite, ...]:
        """Every attention site of the Program."""
        return tuple(site for site in self.every_site if isinstance(site, AttentionSite))

    def is_called(self, site: Site) -> bool:
        """Return whether a site is inside a layer that calls a function; a layer's inputs and outputs are not."""
        table = self.resolver.table
        of_call = isinstance(table, CalledSites) and table.call_of(site.key.module) is not None
        return of_call and not isinstance(site, ValueSite)

    def builder(self, program: Program, adaptation: str, method: str, seams: Seams | None = None) -> Builder:
        """Return a builder that inserts an adaptation's nodes."""
        builder = Builder(program, self.store, adaptation, method, self.work.initial, seams=seams)
        builder.find_places = self._sites_of_places
        return builder

    def _sites_of_places(self) -> Mapping[str, Sequence[Site]]:
        """Return the first site of every place in the model, by the adaptation's name."""
        return {item.name: [site for site, _ in item.places] for item in self.every_place}

    @property
    def every_place(self) -> Sequence[Resolved]:
        """The adaptations with the sites of the first signature, which has all places of the model."""
        first = self.places
        while isinstance(first, Adapting):
            if first.places is None:
                return first.resolved
            first = first.places
        return self.resolved if first is None else first.resolved
