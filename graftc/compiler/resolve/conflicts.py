"""Refuse two adaptations of one weight that cannot be combined."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from graftc.passes.core.sites.sites import LinearSite, Site
from graftc.passes.core.weights.weight_slice import WeightSlice
from graftc.specs.document import Spec
from graftc.specs.errors.diagnostics import GraftError, Place


def require_no_conflict(spec: Spec, adaptations: Sequence[tuple[str, Sequence[Site]]]) -> None:
    """Raise if two adaptations of one weight have overlapping rows that are not exactly the same.

    Args:
        spec: the spec, by which errors are located.
        adaptations: the name and the places of each adaptation, in the order of the spec.

    Raises:
        GraftError: GC021.
    """
    owners: dict[tuple[str, str], dict[WeightSlice, list[str]]] = defaultdict(dict)
    for index, (name, places) in enumerate(adaptations):
        for site in places:
            if not isinstance(site, LinearSite):
                continue
            owners_of_rows = owners[site.key.module, site.key.name]
            for taken, names in owners_of_rows.items():  # one per part of a weight, however many adaptations
                same = taken == site.own and names[-1] != name
                if taken.overlaps(site.own) and not same:
                    raise spec.locate(
                        GraftError(
                            "GC021",
                            f"{name!r} adapts {_rows(site.own)} of {site.key.module}, "
                            f"but {names[0]!r} adapts {_rows(taken)} of it",
                            place=Place(path=f"adapt[{index}].target"),
                            hint="adaptations stack only on exactly the same rows; leave one of them out, or name "
                            "the same rows in both",
                        )
                    )
            owners_of_rows.setdefault(site.own, []).append(name)


def _rows(own: WeightSlice) -> str:
    return "all rows" if own.whole else str(own)
