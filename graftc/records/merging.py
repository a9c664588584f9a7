"""The adaptations that a merge left beside the base, and its work file by file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge

from graftc.records.fields import Name
from graftc.specs.records.record import Record


@dataclass(frozen=True)
class Unfolded(Record, published="KeptData"):
    """An adaptation that stays beside the base."""

    name: Name

    reason: str
    """Why it does not fold."""


@dataclass(frozen=True)
class Streamed(Record):
    """A merge that was done file by file."""

    untouched_tensors: Annotated[int, Ge(0)]
    """How many tensors are the base's, bit for bit."""

    resumed_files: Annotated[int, Ge(0)]
    """How many files a run that was killed had done already."""
