"""The values that layers start from and end with: :func:`layer_values`."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field

from torch import fx

from graftc.compiler.findings import Sublayer
from graftc.specs.roles import parse_role


@dataclass
class LayerRun:
    """One run of one layer, with its sublayers in graph order.

    Attributes:
        owner: the layer's path.
        layer, stack: its index, and the path of the list it is in.
        sublayers: its residual branches.
        ends: what tells a sublayer from another run of the same one.
    """

    owner: str
    layer: int
    stack: str
    sublayers: list[Sublayer] = field(default_factory=list)
    ends: set[Hashable] = field(default_factory=set)

    @property
    def entry(self) -> fx.Node:
        """What the layer reads: the stream that its first branch is added to."""
        return min(sublayer.stream for sublayer in self.sublayers)

    @property
    def exit(self) -> fx.Node:
        """What the layer gives: what its last branch ends with."""
        return max(sublayer.output for sublayer in self.sublayers)

    @property
    def stem(self) -> str:
        """``encoder.`` or ``decoder.`` where the model has both stacks; empty elsewhere."""
        roles = [parse_role(role) for sublayer in self.sublayers for role in sublayer.roles]
        return "".join(f"{p}." for p in (roles[0].prefixes if roles else ()) if p != "cross")


def layer_values(
    sublayers: Sequence[Sublayer], end: Callable[[Sublayer], Hashable]
) -> dict[str, list[tuple[LayerRun, str]]]:
    """The runs of every layer, each with its stem, by the layer's path and in graph order.

    Args:
        sublayers: residual branches in graph order; those without a role belong to their layers too.
        end: what a branch ends in. A layer in which one appears a second time has begun to run again.
    """
    found: dict[str, list[LayerRun]] = {}
    for sublayer in sublayers:
        if sublayer.layer is None:
            continue
        runs = found.setdefault(sublayer.owner, [])
        mark = end(sublayer)
        if not runs or mark in runs[-1].ends:
            runs.append(LayerRun(sublayer.owner, sublayer.layer, sublayer.stack))
        runs[-1].sublayers.append(sublayer)
        runs[-1].ends.add(mark)
    stems: dict[str, str] = {}
    for run in (run for runs in found.values() for run in runs):
        stems[run.stack] = stems.get(run.stack) or run.stem
    return {owner: [(run, stems[run.stack]) for run in runs] for owner, runs in found.items()}
