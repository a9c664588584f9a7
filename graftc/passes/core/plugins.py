"""Find the packages that register passes, using their metadata alone, without importing their code.

Packages register passes in the entry-point group ``graftc.passes``. An entry point names an `AddedPass`, for example
``macs = "graftc_macs:COUNT"``.
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
        distribution, version: the installed package and its version; without metadata, the module and an empty string.
        entry_point: the entry point that registers it, such as ``macs = "graftc_macs:COUNT"``.
    """

    distribution: str
    version: str
    entry_point: str

    @property
    def place(self) -> Place:
        """The location that errors report for faults of the plugin."""
        return Place(path=f"entry point {self.entry_point}")

    @property
    def remedy(self) -> str:
        """The hint for users who did not write the plugin."""
        return f"repair or uninstall {self.distribution}"

    def error(self, code: str, message: str, hint: str = "") -> GraftError:
        """Return the error for a fault of the plugin; the hint is `remedy` unless one for its author is given."""
        return GraftError(code, message, place=self.place, hint=hint or self.remedy)

    def __str__(self) -> str:
        return f"{self.distribution} {self.version}".rstrip()


@cache
def plugins() -> Mapping[EntryPoint, Plugin]:
    """Return the entry points and their packages, in the order of the entry points' names; the result is cached."""
    points = sorted(entry_points(group=GROUP), key=lambda point: (point.name, point.value))
    return {point: plugin_of(point) for point in points}


def plugin_of(point: EntryPoint) -> Plugin:
    """Return the package that registers an entry point."""
    named = f'{point.name} = "{point.value}"'
    return Plugin(*((point.dist.name, point.dist.version) if point.dist is not None else (point.module, "")), named)


def registered() -> list[str]:
    """Return every pass with its package and version, which are part of the key of cached captures."""
    return [f"{plugin.entry_point} of {plugin}" for plugin in plugins().values()]
