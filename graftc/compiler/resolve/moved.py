"""`SiteMove`: translates sites from one layer to another, for example from a written-out layer to a call to it."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from functools import cache
from typing import Any, TypeVar, cast

from torch import Tensor, fx

from graftc.compiler.roles.findings import place
from graftc.passes.core.ir.functions import renamed
from graftc.passes.core.sites.sites import LinearSite, Site
from graftc.passes.core.sites.uses import Use

S = TypeVar("S", bound=Site)
_PLAIN = frozenset({int, float, bool, type(None), Tensor})


def nodes_within(value: Any) -> bool:
    """Return whether a value contains a node; a value that cannot be inspected counts as containing one."""
    if isinstance(value, tuple | list):
        return any(map(nodes_within, value))
    if isinstance(value, dict):
        return any(map(nodes_within, value.values()))
    if is_dataclass(value) and not isinstance(value, type):
        return any(nodes_within(getattr(value, field.name)) for field in fields(value))
    return not isinstance(value, bool | int | float | str | Tensor | None)


@cache
def _names(kind: Any) -> tuple[str, ...]:
    """Return the names of the fields of a dataclass that a move inspects; cached for each class."""
    return tuple(field.name for field in fields(kind) if field.name != "applied")


class SiteMove:
    """Translates sites from one layer to another.

    Args:
        before, after: paths of the two layers.
        nodes: replacements for nodes; all other nodes stay unchanged.
    """

    def __init__(self, before: str, after: str, nodes: Mapping[fx.Node, fx.Node]) -> None:
        self.before, self.after, self._nodes = before, after, nodes
        self._uses: dict[Use, Any] = {}

    def site(self, site: S) -> S:
        """Return a site's counterpart in the other layer, with nothing inserted; sites that share a use still do so."""
        moved = self._copied(site)
        if self.before != self.after:
            moved.layer, moved.stack = place(moved.key.module)
        if isinstance(moved, LinearSite):
            moved.applied = []
        return cast("S", moved)

    def _value(self, value: Any) -> Any:
        kind = type(value)
        if kind in _PLAIN:
            return value
        if kind is fx.Node:
            return self._nodes.get(value, value)
        if kind is str:
            return renamed(value, self.before, self.after)
        if isinstance(value, Use):
            if value not in self._uses:
                self._uses[value] = self._copied(value)
            return self._uses[value]
        if isinstance(value, tuple | list):
            return type(value)(map(self._value, value))
        if is_dataclass(value) and not isinstance(value, type | Tensor):
            return self._copied(value)
        return value

    def _copied(self, value: Any) -> Any:
        copied = copy.copy(value)
        for name in _names(type(value)):  # type: ignore[arg-type]  # mypy does not consider classes hashable
            now = getattr(value, name)
            moved = self._value(now)
            if moved is not now:
                object.__setattr__(copied, name, moved)
        return copied
