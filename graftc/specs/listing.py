"""The list of methods and their properties, without torch: `graftc.methods`."""

from __future__ import annotations

from graftc.specs.claims import MethodInfo
from graftc.specs.registry import SpecEntry, method_specs


def methods() -> list[MethodInfo]:
    """Return every method, built-in or from a plugin, in the order of their tags.

    Raises:
        GraftError: GC070 if two modules claim one tag, GC071 if a plugin is broken.
    """
    return [method_info(entry) for entry in method_specs().values()]


def method_info(entry: SpecEntry) -> MethodInfo:
    """Return the properties of a registered method."""
    return MethodInfo(entry.tag, entry.summary, entry.paper, entry.claims, entry.module)
