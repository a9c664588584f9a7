"""The differences of two artifacts, or of two model folders."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from annotated_types import Ge, Le

from graftc.records.fields import Name
from graftc.specs.records.record import OrNull, Record, stated

Cause = Literal["low rank", "row scaling", "column scaling", "rows", "entries", "vector", "full", "rounding"]
"""A possible cause of a difference: a product of two thin matrices, such as LoRA's; each row, or each column, times a
number, as IA3 has it; some rows in full, such as those of tokens; few entries; a bias, a norm or another vector; all of
it, or an update of high rank such as DoRA's; no more than rounding."""


@dataclass(frozen=True)
class SiteChanges(Record, published="SiteChanges"):
    """Adapted places that differ, as text."""

    added: tuple[str, ...]
    """Those that only the second artifact has."""

    removed: tuple[str, ...]
    """Those that only the first artifact has."""

    changed: tuple[str, ...]
    """Those that both have and adapt differently."""


@dataclass(frozen=True)
class TensorChange(Record, published="TensorChange"):
    """A tensor that differs."""

    name: Name

    status: Literal["added", "removed", "changed", "moved"]
    """How it differs; `moved`: the same values under another name."""

    largest_difference: Annotated[float | None, Ge(0)]
    """Largest absolute difference of its elements; null where they cannot be compared."""


NO_CHANGES = SiteChanges((), (), ())


@dataclass(frozen=True)
class Comparison(Record, behind={"base": ("same",)}):
    """The differences of two artifacts; all of them are empty where both do the same to the same model."""

    base: tuple[str, ...] = ()
    """In which ways they adapt other models."""

    spec: str = ""
    """The specs as a unified diff; empty where they are equal."""

    sites: SiteChanges = NO_CHANGES
    """Adapted places that differ."""

    tensors: tuple[TensorChange, ...] = ()
    """Tensors that differ."""

    graph: str = ""
    """The adapted graphs as a diff; empty where they are equal."""

    @stated
    def same(self) -> bool:
        """Whether nothing differs."""
        return not (self.base or self.spec or self.sites != NO_CHANGES or self.tensors or self.graph)


@dataclass(frozen=True)
class Difference(Record):
    """The difference between two models' versions of a tensor."""

    largest: Annotated[float, Ge(0), OrNull()]
    """The largest absolute difference of an element; null where it is not finite."""

    norm: Annotated[float, Ge(0), OrNull()]
    """Norm of the difference over the base's; null where it is not finite."""

    entries: Annotated[float, Ge(0), Le(1)]
    """Share of the elements that differ."""

    rows: Annotated[int | None, Ge(0)] = None
    """Of a matrix, how many rows differ anywhere."""

    columns: Annotated[int | None, Ge(0)] = None
    """Of a matrix, how many columns differ anywhere."""

    rank: Annotated[int | None, Ge(0)] = None
    """Of a matrix, how many directions of the difference are above what rounding makes; null where that is more than
    are looked for, or a scaling is found."""

    explained: float | None = None
    """Share of the difference's squared norm in those directions, or in the scaling."""

    cause: Cause = "full"
    """A possible cause of it."""

    def to_json(self) -> dict[str, Any]:
        """Return plain data."""
        data = super().to_json()
        return data | {name: None for name in ("largest", "norm") if not math.isfinite(data[name])}


@dataclass(frozen=True)
class WeightChange(Record, published="WeightChange"):
    """A tensor that is not the same in two models."""

    name: Name

    status: Literal["added", "removed", "reshaped", "retyped", "changed"]
    """Only the second has it, only the first has it, its sizes differ, only its element type differs, or its values
    do."""

    base: str
    """Element type and sizes in the first, as `BF16[4, 48]`; empty where it is missing."""

    other: str
    """Element type and sizes in the second; empty where it is missing."""

    difference: Difference | None = None
    """The numbers, where values differ and can be compared."""


@dataclass(frozen=True)
class WeightsDiff(Record, published="WeightsDiff"):
    """The differences between the weights of two model folders."""

    equal: Annotated[int, Ge(0)]
    """How many tensors are the same."""

    tensors: tuple[WeightChange, ...]
    """Those that are not."""

    @property
    def same(self) -> bool:
        """Whether nothing differs."""
        return not self.tensors
