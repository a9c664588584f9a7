"""The checks of an artifact or of a merged folder."""

from __future__ import annotations

from dataclasses import dataclass

from graftc.specs.records.record import Record


@dataclass(frozen=True)
class Check(Record):
    """One check of an artifact."""

    name: str
    """What was checked."""

    passed: bool | None
    """Whether it holds; null where it was not done."""

    detail: str
    """What was found, or why it was not done, for people."""
