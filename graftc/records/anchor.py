"""The comparison of a graph with the model that it was captured from."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from annotated_types import Ge

from graftc.records.fields import Seconds
from graftc.specs.records.record import Record, stated


@dataclass(frozen=True)
class AnchorRecord(Record, published="AnchorData", behind={"bound": ("exact",)}):
    """How a base graph compares with the source model itself, run on the same inputs."""

    inputs: str
    """The inputs of both: names of tensors, and flags."""

    mode: Literal["train", "eval"]
    """The mode of both."""

    difference: Annotated[float | None, Ge(0)]
    """The largest difference of any output or updated buffer, over its largest element; null where it was not looked
    at."""

    bound: Annotated[float, Ge(0)]
    """The largest `difference` that is allowed where kernels differ."""

    skipped: str = ""
    """Why it was not looked at; empty where it was."""

    @stated
    def exact(self) -> bool:
        """Whether all are equal to the bit."""
        return self.difference == 0


@dataclass(frozen=True)
class TimedAnchor(AnchorRecord):
    """A comparison of a base graph with the source model, with the time that it took."""

    seconds: Seconds = field(default=0.0, compare=False)
