"""Results of analysing a graph: roles with their evidence, and parts that could not be resolved."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, fx

from graftc.passes.core.grouping import grouped
from graftc.passes.core.sites.sites import AttentionOperands
from graftc.records.roles import Finding, Sublayer, Unresolved, role_rows, unresolved_rows


@dataclass(frozen=True, eq=False)
class Heads:
    """The columns of an attention call's keys and values, head by head.

    Attributes:
        keys, values: ``int64[heads, width]``: each head's columns of the projection, renumbered from 0 in their order;
            heads that share keys have the same numbers.
        operands: the values that contain these columns.
    """

    keys: Tensor
    values: Tensor
    operands: AttentionOperands


@dataclass(frozen=True)
class Structure:
    """The architecture of one graph.

    Attributes:
        findings: the roles, in graph order.
        unresolved: the weights and other nodes without a role, with reasons.
        sublayers: the residual branches, in graph order.
        heads: the heads of each attention call whose keys and values can be followed head by head.
    """

    findings: tuple[Finding, ...]
    unresolved: tuple[Unresolved, ...] = ()
    sublayers: tuple[Sublayer, ...] = field(default=(), repr=False)
    heads: Mapping[fx.Node, Heads] = field(default_factory=dict, repr=False)

    def by_role(self) -> dict[str, list[Finding]]:
        """Return the findings by full role, in graph order."""
        return grouped(self.findings, lambda finding: finding.role)

    def having(self, role: str) -> list[Finding]:
        """Return the findings that match ``role``: ``attn.k`` also matches ``decoder.cross.attn.k``."""
        return [f for f in self.findings if role in f.roles]

    def to_json(self) -> dict[str, Any]:
        """Return plain values for ``graftc roles --json``."""
        return {
            "findings": [f.to_json() for f in self.findings],
            "unresolved": [u.to_json() for u in self.unresolved],
            "sublayers": [s.to_json() for s in self.sublayers],
        }

    def rows(self) -> list[tuple[str, str, str, str, str]]:
        """Return `role_rows` of the findings."""
        return role_rows(self.findings)

    def unresolved_rows(self) -> list[tuple[str, str, str]]:
        """Return `unresolved_rows` of the parts without a role."""
        return unresolved_rows(self.unresolved)


def reasons(unresolved: Iterable[Unresolved], spot: tuple[str, int] | None) -> list[str]:
    """Return the parts without a role, with reasons, of a layer (given by stack and index) or the whole model."""
    return [f"{u.module}: {u.reason}" for u in unresolved if spot is None or (u.stack, u.layer) == spot]


def place(module: str) -> tuple[int | None, str]:
    """Return the layer and stack of a module path: the first number in it, and the path before that number."""
    segments = module.split(".")
    for index, segment in enumerate(segments):
        if segment.isdigit():
            return int(segment), ".".join(segments[:index])
    return None, ""
