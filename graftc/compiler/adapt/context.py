"""What the passes that adapt one Program know and find out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from graftc.compiler.capture.capture import Capture
from graftc.compiler.capture.request import CaptureRequest
from graftc.compiler.compilation import Compilation, Resolution
from graftc.compiler.resolve.embeds import Plan
from graftc.compiler.resolve.resolver import Resolved, Resolver
from graftc.compiler.roles.structure import Structure
from graftc.passes.core.build.builder import Builder
from graftc.passes.core.build.seams import Seams
from graftc.passes.core.ir.program import Program
from graftc.passes.core.sites.sites import AttentionSite, ParameterSite
from graftc.passes.core.weights.store import Store


@dataclass
class Adapting:
    """One Program that is being adapted.

    Attributes:
        compilation: what it belongs to.
        request: what was asked of the capture.
        capture: what was captured.
        places: whose places are adapted: those of the first signature, or of the same signature in train mode; None
            where the spec's targets say.
        controls: inputs beside the source model's, by which a call chooses among adaptations.
        base: the Program that is adapted, which stays as it is.
        captures: what it was made of.
        resolver, structure: its sites and its roles, once they are known.
        resolved, trained: the adaptations with their sites, and tensors that train in place, once they are known.
        plan: the virtual tokens, by the ids in front of which they stand.
    """

    compilation: Compilation
    request: CaptureRequest
    capture: Capture
    places: Resolution | Adapting | None
    controls: Sequence[str]
    base: Program = field(init=False)
    captures: list[Capture] = field(init=False)
    resolver: Resolver = field(init=False)
    structure: Structure = field(init=False)
    resolved: list[Resolved] = field(default_factory=list)
    trained: list[ParameterSite] = field(default_factory=list)
    plan: Plan = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.base, self.captures = self.capture.program, [self.capture]

    @property
    def store(self) -> Store:
        """Every tensor."""
        return self.compilation.store

    @property
    def attentions(self) -> tuple[AttentionSite, ...]:
        """Every attention of the Program."""
        every = (site for sites in self.resolver.table.entries for site in sites)
        return tuple(site for site in every if isinstance(site, AttentionSite))

    def builder(self, program: Program, adaptation: str, method: str, seams: Seams | None = None) -> Builder:
        """What inserts an adaptation's nodes."""
        compilation = self.compilation
        given = program, compilation.store, adaptation, method, compilation.seed, compilation.values
        return Builder(*given, seams=seams, narrow=compilation.narrow)

    def collect(self, build: Builder) -> None:
        """Take in the tensors that a builder made, by adaptation and site."""
        self.compilation.parts.setdefault(build.adaptation, {}).update(build.parts)
