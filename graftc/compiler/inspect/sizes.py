"""Read the sizes of adaptations at their places from the spec: ranks, lengths, bottlenecks."""

from __future__ import annotations

from collections import defaultdict

from graftc.compiler.inspect.snapshot import Snapshot
from graftc.records.places import AdaptedPlace
from graftc.specs.base import MethodSpec
from graftc.specs.claims import SiteKind
from graftc.specs.errors.text import format_layers
from graftc.specs.roles import widen


class StatedSizes:
    """The sizes that the spec defines for adaptations at their places, with overrides applied.

    Args:
        snapshot: the Compilation with the places.
    """

    def __init__(self, snapshot: Snapshot) -> None:
        self.snapshot = snapshot
        self._specs = {adaptation.name: adaptation for adaptation in snapshot.spec.adapt}
        self._sites: dict[str, list[AdaptedPlace]] = defaultdict(list)
        self._depths: dict[str, int] = {}
        for record in snapshot.sites:
            self._sites[record.adaptation].append(record)
            if record.layer is not None:
                self._depths[record.stack] = max(self._depths.get(record.stack, 0), record.layer + 1)

    def spec(self, record: AdaptedPlace) -> MethodSpec | None:
        """Return an adaptation's spec at a place, with overrides applied; None for compositions."""
        adaptation = self._specs.get(record.adaptation)
        if adaptation is None or not adaptation.override_list():
            return adaptation
        roles = {wider for role in record.roles for wider in widen(role)}
        depth = self._depths.get(record.stack)
        parameter = record.key.name if record.kind == str(SiteKind.EXPERTS) else ""
        return adaptation.for_site(record.module, roles, record.layer, depth=depth, parameter=parameter)

    def at(self, record: AdaptedPlace) -> tuple[str, str] | None:
        """Return an adaptation's size at a place, ``("rank", "8")``; None if the spec has none."""
        own = self.spec(record)
        size = None if own is None else own.stated_size()
        return None if size is None else (size[0].replace("_", " "), str(size[1]))

    def text(self, name: str) -> str:
        """Return an adaptation's size, with layers if there are several sizes: ``rank 4 (0-9), rank 8 (10)``."""
        sizes: dict[str, list[int]] = defaultdict(list)
        for record in self._sites.get(name, ()):
            if (size := self.at(record)) is not None:
                sizes[" ".join(size)] += [] if record.layer is None else [record.layer]
        if len(sizes) <= 1:
            return next(iter(sizes), "")
        return ", ".join(f"{size} ({format_layers(layers)})" if layers else size for size, layers in sizes.items())
