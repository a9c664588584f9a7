"""The result of comparing a graph with the model that it was captured from."""

from __future__ import annotations

from dataclasses import dataclass

from graftc.records.anchor import AnchorRecord, TimedAnchor


@dataclass(frozen=True)
class Anchor(TimedAnchor, unstated=("differing", "assigned", "plain", "from_two")):
    """The result of comparing a base graph with the source model itself, on the same inputs."""

    differing: tuple[str, ...] = ()
    """What exceeds the bound, in words."""

    assigned: tuple[str, ...] = ()
    """Attributes of modules that the forward pass assigned."""

    plain: bool = False
    """Whether both could be run on plain inputs only, all ones, with the sizes used for the capture."""

    from_two: tuple[str, ...] = ()
    """Named sizes for which 1 is special to the model, so that the graph is valid from 2 on."""

    @property
    def passed(self) -> bool:
        """Whether nothing contradicts that the graph computes what the model does."""
        return not self.differing

    @property
    def record(self) -> AnchorRecord:
        """The result without anything that depends on the speed of the machine."""
        return AnchorRecord(self.inputs, self.mode, self.difference, self.bound, self.skipped)
