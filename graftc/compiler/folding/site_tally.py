"""`SiteTally`: the measurements at one site, which can be combined over the blocks in which it is folded."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from graftc.compiler.folding.rounding import largest
from graftc.records.certificate import SiteEvidence
from graftc.records.retention import Retention


@dataclass(frozen=True)
class SiteTally:
    """The measurements at one site.

    Attributes:
        site: the site, as text, or the name of a tensor that belongs to no site.
        adaptations: names of the adaptations that fold there.
        change: the largest change that the adaptations make to the output on top of trained copies, and that a copy
            makes to the stored values.
        error: the largest difference between unfolded and folded output.
        scale: the largest absolute output.
        rounding: as for `SiteEvidence`.
        retained: how much of the update is left in the parts of tensors that belong to the site.
    """

    site: str
    adaptations: tuple[str, ...]
    change: float = 0.0
    error: float = 0.0
    scale: float = 1e-30
    rounding: float = 0.0
    retained: Retention = field(default_factory=Retention)

    def __add__(self, other: SiteTally) -> SiteTally:
        numbers = ("change", "error", "scale", "rounding")
        worst: dict[str, Any] = {name: largest(getattr(self, name), getattr(other, name)) for name in numbers}
        adaptations = tuple(dict.fromkeys((*self.adaptations, *other.adaptations)))
        return replace(self, **worst, adaptations=adaptations, retained=self.retained + other.retained)

    @property
    def algebra(self) -> float:
        """The error relative to the largest output."""
        return self.error / self.scale

    @property
    def evidence(self) -> SiteEvidence:
        """The evidence for the site."""
        return SiteEvidence(self.site, self.adaptations, self.change, self.algebra, self.rounding, self.retained)
