"""Packages that register passes, read from their metadata alone: none of their code is imported.

They use the entry-point group ``graftc.passes``. An entry point names an `AddedPass`, as
``macs = "graftc_macs:COUNT"`` does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import EntryPoint, entry_points

from graftc.specs.errors.diagnostics import GraftError, Place

GROUP = "graftc.passes"
"""The entry-point group."""


@dataclass(frozen=True)
class Plugin:
    """A package that provides a pass or an exporter.

    Attributes:
        distribution, version: the installed package; if it has no metadata, its module and an empty string.
        entry_point: the entry point that registers it, such as ``macs = "graftc_macs:COUNT"``.
    """

    distribution: str
    version: str
    entry_point: str

    @property
    def place(self) -> Place:
        """The place of the fault that errors name."""
        return Place(path=f"entry point {self.entry_point}")

    @property
    def remedy(self) -> str:
        """The remedy for a user who did not write the plugin."""
        return f"repair or uninstall {self.distribution}"

    def error(self, code: str, message: str, hint: str = "") -> GraftError:
        """Return the error for a fault of the plugin; the hint is for its author if there is one."""
        return GraftError(code, message, place=self.place, hint=hint or self.remedy)

    def __str__(self) -> str:
        return f"{self.distribution} {self.version}".rstrip()


@cache
def plugins() -> Mapping[EntryPoint, Plugin]:
    """Return the entry points, in the order of their names. They are looked up once."""
    points = sorted(entry_points(group=GROUP), key=lambda point: (point.name, point.value))
    return {point: plugin_of(point) for point in points}


def plugin_of(point: EntryPoint) -> Plugin:
    """Return the package that registers an entry point."""
    named = f'{point.name} = "{point.value}"'
    return Plugin(*((point.dist.name, point.dist.version) if point.dist is not None else (point.module, "")), named)


def registered() -> list[str]:
    """Return every pass with its package and version, which are part of what captures are stored under."""
    return [f"{plugin.entry_point} of {plugin}" for plugin in plugins().values()]
