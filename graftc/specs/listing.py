"""The methods as a list of plain facts, without torch: `graftc.methods`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from graftc.specs.claims import Claims
from graftc.specs.registry import SpecEntry, method_specs

__all__ = ["MethodInfo", "method_info", "methods"]


@dataclass(frozen=True)
class MethodInfo:
    """The facts about a method that are known without loading its code.

    Attributes:
        tag: the value of ``method`` in a spec.
        summary: one sentence.
        paper: the papers to cite; empty if there is none.
        claims: what it can adapt, whether it starts as the identity, whether it folds.
        module: the module that defines its spec; a plugin's is outside of graftc.
    """

    tag: str
    summary: str
    paper: str
    claims: Claims
    module: str

    def to_json(self) -> dict[str, Any]:
        """Return everything as plain values, with sets as sorted lists."""
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
    """Return every method, built in or from a plugin, in the order of their tags.

    Raises:
        GraftError: GC070 if two modules claim one tag, GC071 if a plugin is broken.
    """
    return [method_info(entry) for entry in method_specs().values()]


def method_info(entry: SpecEntry) -> MethodInfo:
    """Return the facts about one registered method."""
    return MethodInfo(entry.tag, entry.summary, entry.paper, entry.claims, entry.module)
