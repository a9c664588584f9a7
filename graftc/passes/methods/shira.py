"""SHiRA: training entries at random positions of each weight (Bhardwaj et al. 2024, arXiv:2406.13175)."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from graftc.passes.core.build.builder import Builder
from graftc.passes.core.method.entry_selection import drawn
from graftc.passes.core.sites.sites import LinearSite, Site
from graftc.passes.core.weights.weight_slice import WeightSlice
from graftc.passes.methods.bases.sparse import ChosenEntries, Key, SparseTensors, random_entries
from graftc.specs.errors.diagnostics import GraftError, Place
from graftc.specs.methods.shira import SHiRA


class SHiRAMethod(SparseTensors[SHiRA]):
    """`SparseTensors` for the weights of linear maps, with ``rank (in + out)`` entries of each matrix."""

    biases = False

    def applies(self, spec: SHiRA, site: Site) -> bool:
        """Return whether the site is a linear map; heads are excluded."""
        return isinstance(site, LinearSite) and super().applies(spec, site)

    def choose(self, spec: SHiRA, regions: Mapping[Key, WeightSlice], build: Builder) -> ChosenEntries:
        """Choose entries of each weight at random.

        Raises:
            GraftError: GC020 if a weight has fewer entries.
        """
        counts = {key: _count(spec, region) for key, region in regions.items()}
        if build.without_values:
            return ChosenEntries(counts, {})
        if spec.mask_seed is None:
            return ChosenEntries(counts, random_entries(counts, regions, build))
        seed = spec.mask_seed
        entries = {
            key: drawn(count, regions[key].size, torch.Generator().manual_seed(seed)) for key, count in counts.items()
        }
        return ChosenEntries(counts, entries)


def _count(spec: SHiRA, region: WeightSlice) -> int:
    """Return the number of entries that train in a weight, or in the selected rows of a weight.

    Raises:
        GraftError: GC020 if it has fewer.
    """
    count = spec.rank * math.prod(region.leading) * (region.count + region.in_features)
    if count > region.size:
        size = f"{region.count} x {region.in_features}"
        raise GraftError(
            "GC020",
            f"rank {spec.rank} would train more entries than {region.tensor} has, which is {size}",
            place=Place(path="rank"),
            hint=f"use a rank of at most {region.count * region.in_features // (region.count + region.in_features)}",
        )
    return count
