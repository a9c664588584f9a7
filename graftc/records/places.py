"""The places of a model that adaptations are at, and the tensors that trained copies replace."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, TypeAlias

from pydantic import AfterValidator, Field

from graftc.records.fields import AdaptationName, MethodTag
from graftc.records.site_key import SiteKey
from graftc.specs.records.record import Record


def _ascending(runs: tuple[tuple[int, int], ...]) -> tuple[tuple[int, int], ...]:
    flat = [0, *(end for run in runs for end in run)]
    if sorted(flat) != flat:
        raise ValueError("runs that overlap, or are not in order")
    return runs


Count: TypeAlias = Annotated[int, Field(ge=0, lt=2**63)]
Runs: TypeAlias = Annotated[tuple[tuple[Count, Count], ...], AfterValidator(_ascending)]


@dataclass(frozen=True)
class AdaptedPlace(Record, published="PlaceRecord", closed=True):
    """One adapted place."""

    adaptation: AdaptationName

    method: MethodTag

    module: str
    """Path of the module."""

    name: str
    """Name of the parameter, or role of the value."""

    part: str
    """The rows of a fused tensor, by the last word of their role; empty for all."""

    use: Count
    """The number of the use, for places other than tensors."""

    kind: str
    """Kind of site."""

    roles: tuple[str, ...]
    """Its roles in the architecture."""

    layer: Count | None
    """Index of its layer."""

    stack: str
    """Path of the list of layers."""

    rows: Runs | None
    """The own rows of the stored weight as half-open runs; null is all."""

    uses: Count
    """How often the graph reads it."""

    evidence: str
    """Why it has its role."""

    tensors: Mapping[str, str]
    """The adaptation's tensors there, by part."""

    @property
    def key(self) -> SiteKey:
        """The key of the site."""
        return SiteKey(self.module, self.name, self.part, self.use)


@dataclass(frozen=True)
class TrainedCopy(Record, published="Trained", closed=True):
    """A base tensor that a trained copy stands in for."""

    owner: str
    """The adaptation; `trained` for the spec's train list, `tokens` for new tokens."""

    base: str
    """The base tensor."""

    rows: Runs | None
    """Its trained rows; null is all."""

    tensor: str
    """The trained copy."""
