"""Candidates: the places of a model that a target may select. Torch-free."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass

from graftc.specs.claims import SiteKind


@dataclass(frozen=True)
class Candidate:
    """One place that a target may select.

    Attributes:
        key: what the caller knows the place by.
        module: dotted path of its module.
        roles: every role that it answers to, prefixed forms included (``graftc.specs.roles.widen``).
        kind: its kind of site.
        layer: its layer from 0 within its stack; None outside of layers.
        stack: the stack of layers it belongs to.
        label: how messages name it; default the module path.
        part: it is some output rows of a fused weight. A target without ``role`` means modules as a whole,
            and then passes over parts whose whole is a candidate too.
        parameter: name of its parameter where the module has several of its kind, as experts do; empty elsewhere.
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
        """What a pattern may match: the path of its module, and that of its parameter."""
        return (self.module, f"{self.module}.{self.parameter}") if self.parameter else (self.module,)

    @property
    def name(self) -> str:
        """The label, or the module path."""
        return self.label or self.module


def depths(candidates: Iterable[Candidate]) -> dict[str, int]:
    """How many layers each stack has."""
    out: dict[str, int] = {}
    for c in candidates:
        if c.layer is not None:
            out[c.stack] = max(out.get(c.stack, 0), c.layer + 1)
    return out
