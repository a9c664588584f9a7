"""Candidates: the places of a model that a target may select. Torch-free."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass

from graftc.specs.claims import SiteKind


@dataclass(frozen=True)
class Candidate:
    """One place that a target may select.

    Attributes:
        key: the caller's key for the place.
        module: dotted path of its module.
        roles: every role that it matches, including prefixed forms (``graftc.specs.roles.widen``).
        kind: its kind of site.
        layer: its layer from 0 within its stack; None outside of layers.
        stack: the stack of layers that it belongs to.
        label: its name in messages; the module path by default.
        part: whether it is some output rows of a fused weight. A target without ``role`` selects modules as a whole,
            and then skips parts whose whole is a candidate as well.
        parameter: name of its parameter if the module has several of its kind, as experts do; empty otherwise.
    """

    key: Hashable
    module: str
    roles: frozenset[str]
    kind: SiteKind
    layer: int | None = None
    stack: str = ""
    label: str = ""
    part: bool = False
    parameter: str = ""

    @property
    def paths(self) -> tuple[str, ...]:
        """The paths that a pattern may match: that of its module, and that of its parameter."""
        return (self.module, f"{self.module}.{self.parameter}") if self.parameter else (self.module,)

    @property
    def name(self) -> str:
        """The label, or the module path."""
        return self.label or self.module


def depths(candidates: Iterable[Candidate]) -> dict[str, int]:
    """Return the number of layers of each stack."""
    out: dict[str, int] = {}
    for c in candidates:
        if c.layer is not None:
            out[c.stack] = max(out.get(c.stack, 0), c.layer + 1)
    return out
