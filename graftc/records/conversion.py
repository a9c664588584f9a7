"""The result of a conversion to LoRA or to another layout."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal, TypeAlias

from annotated_types import Ge

from graftc.specs.records.record import Record

Proof: TypeAlias = Literal["values", "shapes", "sizes"]
"""The evidence that maps of two models are the same."""


@dataclass(frozen=True)
class RenamedMaps(Record):
    """Maps of an adapter that have got the names of another model."""

    old: str
    """How their paths began; empty if the new prefix came in front of them."""

    new: str
    """How they begin in the other model; empty if the old prefix is gone."""

    maps: Annotated[int, Ge(1)]
    """How many maps."""

    proof: Proof
    """The evidence that they are the same: `values` if the weights of both models are equal at every adapted map,
    `shapes` if all tensors under the prefixes have equal shapes, `sizes` if the adapter's sizes fit nothing else."""


@dataclass(frozen=True)
class ConvertedSite(Record):
    """A converted site, or a converted map of an adapter folder."""

    adaptation: str | None
    """The adaptation; null for an adapter folder."""

    site: str
    """Where: a site, or the path of a map in the base; `<...>.experts.3.gate_proj` for an expert's."""

    rank: int | None
    """Rank of the LoRA there; null for an adapter folder."""

    full_rank: int | None
    """Rank of the original update; null for an adapter folder."""

    error: Annotated[float, Ge(0)]
    """Distance of the new update from the original one, over the norm of that (Frobenius norm)."""

    probed: Annotated[float, Ge(0)]
    """This distance on random inputs, computed from the result: the compiled LoRA, or the written files."""
