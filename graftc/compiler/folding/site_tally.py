"""The measurements at one site, as numbers that add up over the blocks that it is folded in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from graftc.compiler.folding.rounding import largest
from graftc.records.certificate import Retention, SiteEvidence


@dataclass(frozen=True)
class SiteTally:
    """The measurements at one site.

    Attributes:
        site: the site, as text, or the name of a tensor that belongs to none.
        adaptations: names of the adaptations that fold there.
        change: the largest change of the output by the adaptations.
        error: the largest difference of unfolded and folded output.
        scale: the largest output.
        rounding: as for `SiteEvidence`.
        retained: how much of the update is left, for each part of a tensor that belongs to the site.
    """

    site: str
    adaptations: tuple[str, ...]
    change: float = 0.0
    error: float = 0.0
    scale: float = 1e-30
    rounding: float = 0.0
    retained: Sequence[Retention] = ()

    def __add__(self, other: SiteTally) -> SiteTally:
        numbers = ("change", "error", "scale", "rounding")
        worst: dict[str, Any] = {name: largest(getattr(self, name), getattr(other, name)) for name in numbers}
        return replace(self, **worst, retained=(*self.retained, *other.retained))

    @property
    def algebra(self) -> float:
        """The error relative to the largest output."""
        return self.error / self.scale

    @property
    def evidence(self) -> SiteEvidence:
        """The evidence for the site."""
        retention = Retention.total(self.retained)
        return SiteEvidence(self.site, self.adaptations, self.change, self.algebra, self.rounding, retention)
