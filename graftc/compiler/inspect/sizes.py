"""How large adaptations are at their places, as the spec says it: ranks, lengths, bottlenecks."""

from __future__ import annotations

from collections import defaultdict

from graftc.compiler.inspect.snapshot import SiteRecord, Snapshot
from graftc.compiler.roles.findings import format_layers
from graftc.specs.base import MethodSpec
from graftc.specs.claims import SiteKind
from graftc.specs.roles import widen


class StatedSizes:
    """What the spec says of the size of adaptations at their places, overrides applied.

    Args:
        snapshot: whose places.
    """

    def __init__(self, snapshot: Snapshot) -> None:
        self.snapshot = snapshot
        self._specs = {adaptation.name: adaptation for adaptation in snapshot.spec.adapt}
        self._sites: dict[str, list[SiteRecord]] = defaultdict(list)
        self._depths: dict[str, int] = {}
        for record in snapshot.sites:
            self._sites[record.adaptation].append(record)
            if record.layer is not None:
                self._depths[record.stack] = max(self._depths.get(record.stack, 0), record.layer + 1)

    def spec(self, record: SiteRecord) -> MethodSpec | None:
        """What the spec says of an adaptation at a place; None for compositions."""
        found = self._specs.get(record.adaptation)
        if found is None or not found.override_list():
            return found
        roles = {wider for role in record.roles for wider in widen(role)}
        depth = self._depths.get(record.stack)
        parameter = record.key.name if record.kind == str(SiteKind.EXPERTS) else ""
        return found.for_site(record.key.module, roles, record.layer, depth=depth, parameter=parameter)

    def at(self, record: SiteRecord) -> tuple[str, str] | None:
        """How large an adaptation is at a place: ``("rank", "8")``; None where nothing says it."""
        own = self.spec(record)
        size = None if own is None else own.stated_size()
        return None if size is None else (size[0].replace("_", " "), str(size[1]))

    def text(self, name: str) -> str:
        """How large an adaptation is, with layers where there are several sizes: ``rank 4 (0-9), rank 8 (10)``."""
        found: dict[str, list[int]] = defaultdict(list)
        for record in self._sites.get(name, ()):
            if (size := self.at(record)) is not None:
                found[" ".join(size)] += [] if record.layer is None else [record.layer]
        if len(found) <= 1:
            return next(iter(found), "")
        return ", ".join(f"{size} ({format_layers(layers)})" if layers else size for size, layers in found.items())
