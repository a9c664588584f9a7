"""Which packages register passes, from their metadata alone: none of their code is imported.

They are found in the entry-point group ``graftc.passes``. An entry point names an `AddedPass`, as
``macs = "graftc_macs:COUNT"``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import EntryPoint, entry_points

from graftc.specs.errors.diagnostics import Place

GROUP = "graftc.passes"
"""The entry-point group."""


@dataclass(frozen=True)
class Plugin:
    """A package that brings a pass.

    Attributes:
        distribution, version: the installed package; its module and nothing where it has no metadata.
        entry_point: what registers it, as ``macs = "graftc_macs:COUNT"``.
    """

    distribution: str
    version: str
    entry_point: str

    @property
    def place(self) -> Place:
        """Where errors say that the fault is."""
        return Place(path=f"entry point {self.entry_point}")

    @property
    def remedy(self) -> str:
        """What a user can do who did not write it."""
        return f"repair or uninstall {self.distribution}"

    def __str__(self) -> str:
        return f"{self.distribution} {self.version}".rstrip()


@cache
def plugins() -> Mapping[EntryPoint, Plugin]:
    """The entry points, in the order of their names. They are looked up once."""
    points = sorted(entry_points(group=GROUP), key=lambda point: (point.name, point.value))
    return {point: _plugin(point) for point in points}


def _plugin(point: EntryPoint) -> Plugin:
    named = f'{point.name} = "{point.value}"'
    return Plugin(*((point.dist.name, point.dist.version) if point.dist is not None else (point.module, "")), named)


def registered() -> list[str]:
    """Every pass with its package and version: what captures are kept under beside everything else."""
    return [f"{plugin.entry_point} of {plugin}" for plugin in plugins().values()]
