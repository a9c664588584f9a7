"""The part of an update that rounding leaves."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Annotated, Any

from annotated_types import Ge, Le

from graftc.specs.records.record import Record, stated


@dataclass(frozen=True, eq=False)
class Retention(Record, unstated=("exact", "applied", "lost", "wanted", "changed", "beyond")):
    """The part of an update that rounding to the deployed type left: `u` is the exact update, `v` the applied one."""

    exact: float = 0.0
    """``<u, u>``. This and the others are sums over entries, so that parts of tensors and sites add up."""

    applied: float = 0.0
    """``<u, v>``."""

    lost: float = 0.0
    """``|v - u|^2``."""

    wanted: float = 0
    """The number of entries that the update changes: ``u != 0``."""

    changed: float = 0
    """The number of these in which rounding left a change: ``v != 0``."""

    beyond: float = 0
    """The number of parts in which the update is somewhere larger than rounding, of ``W`` or of a norm of its rows, can
    explain."""

    @classmethod
    def before_reading(cls, data: Any) -> Any:
        """Return the sums for the ratios that JSON states instead of them."""
        return _sums(data) if isinstance(data, Mapping) else data

    # JSON states the ratios, not the sums: what is read from it equals what was written.
    def __eq__(self, other: object) -> bool:
        return isinstance(other, Retention) and self._ratios == other._ratios

    def __hash__(self) -> int:
        return hash(self._ratios)

    @property
    def _ratios(self) -> tuple[float, float, float]:
        return self.norm, self.error, self.entries

    def __add__(self, other: Retention) -> Retention:
        return Retention(*(getattr(self, each.name) + getattr(other, each.name) for each in fields(self)))

    @classmethod
    def total(cls, retentions: Iterable[Retention]) -> Retention:
        """Return the retention of several tensors together."""
        return sum(retentions, cls())

    @stated
    def norm(self) -> float:
        """`<u, v> / <u, u>`: 1 where all of it is there, 0 where nothing is."""
        return self.applied / self.exact if self.exact else 1.0

    @stated
    def error(self) -> Annotated[float, Ge(0)]:
        """`|v - u| / |u|`: how far what was applied is from the update."""
        return math.sqrt(self.lost / self.exact) if self.exact else 0.0

    @stated
    def entries(self) -> Annotated[float, Ge(0), Le(1)]:
        """Share of the entries that the update changes in which a change is left."""
        return self.changed / self.wanted if self.wanted else 1.0

    @property
    def is_noise(self) -> bool:
        """Whether rounding explains the whole update, so that it is none."""
        return not self.beyond

    @property
    def unchanged(self) -> bool:
        """Whether no entry differs from the base's."""
        return not self.changed


_LARGEST_RATIO = 1e150
"""Ratios are read up to this value, whose square is finite."""


def _sums(data: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return sums that result in the three ratios of the data, to the bit.

    Raises:
        ValueError: if a ratio is missing or out of range.
    """
    if not data:
        return data
    ratios: dict[str, float] = {}
    for name in ("norm", "error", "entries"):
        ratio = data.get(name)
        if isinstance(ratio, bool) or not isinstance(ratio, int | float) or not abs(ratio) < _LARGEST_RATIO:
            raise ValueError(f"{name} must be a finite number")
        ratios[name] = ratio
    norm, error, entries = ratios.values()
    if error < 0 or not 0 <= entries <= 1:
        raise ValueError("error must be at least 0, and entries from 0 to 1")
    return {"exact": 1.0, "applied": norm, "lost": error**2, "wanted": 1, "changed": entries, "beyond": 1}
