"""What the passes that adapt one Program know and find out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from graftc.compiler.capture.capture import Capture
from graftc.compiler.capture.request import CaptureRequest
from graftc.compiler.compilation import Compilation, Places
from graftc.compiler.resolve.called_sites import CalledSites
from graftc.compiler.resolve.embeds import Plan
from graftc.compiler.resolve.resolver import Resolved, Resolver
from graftc.compiler.resolve.sitetable import BlockedSite
from graftc.compiler.roles.structure import Structure
from graftc.passes.core.build.builder import Builder
from graftc.passes.core.build.initial import Initial
from graftc.passes.core.build.nodes import Nodes
from graftc.passes.core.build.seams import Seams
from graftc.passes.core.build.tensors import ParameterStart
from graftc.passes.core.ir.program import Program
from graftc.passes.core.pass_context import Findings, PassHost
from graftc.passes.core.sites.sites import AttentionSite, ParameterSite, Site, SiteKey, ValueSite
from graftc.passes.core.weights.store import Store
from graftc.specs.document import Spec


@dataclass
class Work:
    """One more signature of a Compilation while it is being made.

    Attributes:
        compilation: what it belongs to, as it is before.
        initial: where new tensors get their values.
        parts: the tensors that are inserted, by adaptation, site and part.
        notes: what capturing had to change, for people, as far as the Compilation does not say it.
    """

    compilation: Compilation
    initial: Initial
    parts: dict[str, dict[SiteKey | None, dict[str, str]]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def enter(self, owner: str, parts: Mapping[SiteKey | None, dict[str, str]]) -> None:
        """Take in the tensors of an adaptation, by site and part."""
        self.parts.setdefault(owner, {}).update(parts)


@dataclass
class Adapting(PassHost):
    """One Program that is being adapted.

    Attributes:
        work: what it belongs to.
        request: what was asked of the capture.
        capture: what was captured.
        places: whose places are adapted: those of the first signature, or of the same signature in train mode; None
            where the spec's targets say.
        controls: inputs beside the source model's, by which a call chooses among adaptations.
        called: whether layers that are alike call functions; otherwise every layer is written out.
        base: the Program that is adapted, which stays as it is.
        captures: what it was made of.
        resolver, structure: its sites and its roles, once they are known.
        resolved, trained: the adaptations with their sites, and tensors that train in place, once they are known.
        plan: the virtual tokens, by the ids in front of which they stand.
        findings: what passes of plugins leave.
        prepared: what methods have made for all sites of an adaptation, by its name, where that is data alone.
        starts: how the parameters begin that were created, by name.
    """

    work: Work
    request: CaptureRequest
    capture: Capture
    places: Places | Adapting | None
    controls: Sequence[str]
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
        """As it is before."""
        return self.work.compilation

    @property
    def store(self) -> Store:
        """Every tensor."""
        return self.compilation.store

    @property
    def asked(self) -> Spec:
        """See `PassHost`."""
        return self.compilation.spec

    @property
    def every_site(self) -> Sequence[Site]:
        """See `PassHost`."""
        every = (site for sites in self.resolver.table.entries for site in sites)
        return [site for site in every if not isinstance(site, BlockedSite)]

    @property
    def adapted_sites(self) -> Mapping[str, Sequence[Site]]:
        """See `PassHost`."""
        return {found.name: [site for site, _ in found.sites] for found in self.resolved}

    def inserting(self, program: Program, owner: str) -> Builder:
        """See `PassHost`."""
        return self.builder(program, owner, owner)

    @property
    def attentions(self) -> tuple[AttentionSite, ...]:
        """Every attention of the Program."""
        every = (site for sites in self.resolver.table.entries for site in sites)
        return tuple(site for site in every if isinstance(site, AttentionSite))

    def is_called(self, site: Site) -> bool:
        """Whether a site is of a layer that calls a function, and none of the values that layers read and give."""
        table = self.resolver.table
        of_call = isinstance(table, CalledSites) and table.call_of(site.key.module) is not None
        return of_call and not isinstance(site, ValueSite)

    def builder(self, program: Program, adaptation: str, method: str, seams: Seams[Nodes] | None = None) -> Builder:
        """What inserts an adaptation's nodes."""
        return Builder(program, self.store, adaptation, method, self.work.initial, seams=seams)
