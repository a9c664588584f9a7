"""SpIEL: training sparse entries, some of which are regularly replaced (Ansell et al. 2024, arXiv:2401.16405)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from graftc.passes.core.build.builder import Builder
from graftc.passes.core.method.capabilities import Reselecting
from graftc.passes.core.method.entry_selection import shares
from graftc.passes.core.method.steering import zero_state
from graftc.passes.core.sites.sites import LinearSite, Site
from graftc.passes.core.weights.weight_slice import WeightSlice
from graftc.passes.methods.bases.drop_and_grow import Reselection
from graftc.passes.methods.bases.sparse import ChosenEntries, Key, SparseTensors, budget_of, key_of, random_entries
from graftc.passes.methods.full import Stored
from graftc.specs.errors.diagnostics import GraftError, Place
from graftc.specs.methods.spiel import PROJECTIONS, SpIEL
from graftc.specs.roles import parse_role


class SpIELMethod(SparseTensors[SpIEL], Reselecting):
    """`SparseTensors` for the weights of linear maps, with `Reselection` between optimiser steps.

    With ``AG``, every tensor also has buffers for the data that a window gathers: ``<tensor>_candidates``, in the same
    form as the indices; ``<tensor>_gradient: f32[k]``, the sum over the micro-batches of a step; and ``<tensor>_sum``
    and ``<tensor>_square``, the sums of the steps' gradients and of their squares. ``seen: int64[tensors]`` contains
    the 1-based step of the window in which the candidates were selected, or 0 if there are none.
    """

    controller = Reselection
    biases = False

    def applies(self, spec: SpIEL, site: Site) -> bool:
        """Return whether the site is a linear map; by default, it must also be a projection in a layer.

        A fused projection counts as a whole.
        """
        if not isinstance(site, LinearSite) or not super().applies(spec, site):
            return False
        if spec.target.modules != "**":
            return True
        # A fused weight as a whole has no role; its rows have roles.
        known = not site.roles or any(parse_role(role).name in PROJECTIONS for role in site.roles)
        return site.layer is not None and known

    def remedy(self, spec: SpIEL) -> str | None:
        """Suggest naming maps if the target names none."""
        return "name maps in target, with role or modules" if spec.target.modules == "**" else None

    def prepare(self, spec: SpIEL, sites: Sequence[Stored], build: Builder) -> ChosenEntries:
        """Select the entries and, with ``AG``, create the buffer ``seen``."""
        chosen = super().prepare(spec, sites, build)
        if spec.variant == "AG":
            count = sum(1 for own in chosen.counts.values() if own)
            build.keep_buffer("seen", zero_state([count], torch.int64))
        return chosen

    def choose(self, spec: SpIEL, regions: Mapping[Key, WeightSlice], build: Builder) -> ChosenEntries:
        """Choose entries at random, from each tensor a number proportional to its size, rounded down.

        Raises:
            GraftError: GC020 if no entries would be chosen, or more than the target has.
        """
        sizes = [region.size for region in regions.values()]
        counts = dict(zip(regions, shares(_budget(spec, regions), sizes, exact=False), strict=True))
        if not any(counts.values()):
            field = next((f for f in ("entries", "equivalent_rank") if getattr(spec, f) is not None), "density")
            message = f"{spec.method} would train no entries in any of the target's {len(sizes)} weights"
            raise GraftError("GC020", message, place=Place(path=field), hint=f"raise {field}")
        return ChosenEntries(counts, {} if build.without_values else random_entries(counts, regions, build))

    def place(self, spec: SpIEL, site: Stored, region: WeightSlice, shared: ChosenEntries, build: Builder) -> None:
        """Replace a tensor of the base and, with ``AG``, create the buffers of a window."""
        super().place(spec, site, region, shared, build)
        count = shared.counts[key_of(region)]
        if spec.variant == "AG" and count:
            build.keep_buffer(f"{region.part}_candidates", zero_state([count], region.index_dtype))
            for kind in ("gradient", "sum", "square"):
                build.keep_buffer(f"{region.part}_{kind}", zero_state([count]))


def _budget(spec: SpIEL, regions: Mapping[Any, WeightSlice]) -> int:
    total = sum(region.size for region in regions.values())
    if spec.equivalent_rank is None:
        return budget_of(spec, total)
    sides = sum(region.own_shape[0] + region.size // region.own_shape[0] for region in regions.values())
    count = spec.equivalent_rank * sides
    if count > total:
        message = f"{spec.method} would train {count} of the target's {total} entries"
        raise GraftError("GC020", message, place=Place(path="equivalent_rank"), hint="lower equivalent_rank")
    return count
