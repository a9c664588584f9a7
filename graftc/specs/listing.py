"""The methods as a list of plain facts, without torch: `graftc.methods`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from graftc.specs.claims import Claims
from graftc.specs.registry import SpecEntry, method_specs

__all__ = ["MethodInfo", "method_info", "methods"]


@dataclass(frozen=True)
class MethodInfo:
    """What is known of a method without loading its code.

    Attributes:
        tag: what a spec writes as ``method``.
        summary: one sentence.
        paper: the papers to cite; empty where there is none.
        claims: what it can adapt, whether it starts as the identity, whether it folds.
        module: the module that defines its spec; a plugin's lies outside of graftc.
    """

    tag: str
    summary: str
    paper: str
    claims: Claims
    module: str

    def to_json(self) -> dict[str, Any]:
        """Everything as plain values; sets as sorted lists."""
        return {
            "tag": self.tag,
            "summary": self.summary,
            "paper": self.paper,
            "claims": {
                "sites": sorted(self.claims.sites),
                "identity_at_init": self.claims.identity_at_init,
                "folds": str(self.claims.folds),
                "bankable": self.claims.bankable,
                "inert": sorted(self.claims.inert),
            },
            "module": self.module,
        }


def methods() -> list[MethodInfo]:
    """Every method, built in or from a plugin, in the order of their tags.

    Raises:
        GraftError: GC070 where two modules claim one tag, GC071 where a plugin is broken.
    """
    return [method_info(entry) for entry in method_specs().values()]


def method_info(entry: SpecEntry) -> MethodInfo:
    """The facts of one registered method."""
    return MethodInfo(entry.tag, entry.summary, entry.paper, entry.claims, entry.module)
