"""Training a fixed set of entries, selected at random or by magnitude, movement or Fisher information
(arXiv:2111.09839).
"""

from __future__ import annotations

from collections.abc import Mapping

from graftc.passes.core.build.builder import Builder
from graftc.passes.core.method.scoring import Fisher, Movement, Scoring
from graftc.passes.core.weights.weight_slice import WeightSlice
from graftc.passes.methods.bases.sparse import ChosenEntries, Key, ScoredTensors, largest_entries
from graftc.specs.methods.mask import Mask


class MaskMethod(ScoredTensors[Mask]):
    """`ScoredTensors` whose entries are selected once, as `Mask.selection` specifies."""

    def scoring(self, spec: Mask) -> Scoring | None:
        """Return the example-based scoring for `fish` and `movement`, and None for other selections."""
        return {"fish": Fisher(), "movement": Movement()}.get(spec.selection)

    def each(self, spec: Mask) -> bool:
        """Return whether each tensor gets a number of entries proportional to its size."""
        return spec.allocation == "per_tensor"

    def choose(self, spec: Mask, regions: Mapping[Key, WeightSlice], build: Builder) -> ChosenEntries:
        """Choose the largest entries for `magnitude`; otherwise, random ones until examples have been scored."""
        if spec.selection != "magnitude" or build.without_values:
            return super().choose(spec, regions, build)
        return largest_entries(
            spec,
            regions,
            lambda key: regions[key].entries(build.store.get(key[0]).detach()).abs(),
            each=self.each(spec),
        )
