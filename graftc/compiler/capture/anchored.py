"""The result of comparing a graph with the model that it was captured from."""

from __future__ import annotations

from dataclasses import dataclass

from graftc.records.anchor import AnchorRecord, TimedAnchor


@dataclass(frozen=True)
class Anchor(TimedAnchor, unstated=("differing", "assigned", "plain", "from_two")):
    """The result of comparing a base graph with the source model itself, on the same inputs."""

    differing: tuple[str, ...] = ()
    """Descriptions of the differences that exceed the bound."""

    assigned: tuple[str, ...] = ()
    """Module attributes that the forward pass assigned."""

    plain: bool = False
    """Whether both could be run only on inputs of all ones, with the sizes used for the capture."""

    from_two: tuple[str, ...] = ()
    """Named sizes for which 1 is a special case in the model, so that the graph is valid only from 2 upwards."""

    @property
    def passed(self) -> bool:
        """Whether no difference above the bound was found between the graph and the model."""
        return not self.differing

    @property
    def record(self) -> AnchorRecord:
        """The result without its duration."""
        return AnchorRecord(self.inputs, self.mode, self.difference, self.bound, self.skipped)
