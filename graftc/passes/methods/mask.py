"""Fixed selections of entries: at random, by magnitude, by movement, by Fisher information (arXiv:2111.09839)."""

from __future__ import annotations

from collections.abc import Mapping

from graftc.passes.core.build.builder import Builder
from graftc.passes.core.method.scoring import Fisher, Movement, Scoring
from graftc.passes.core.weights.weight_slice import WeightSlice
from graftc.passes.methods.selection import ChosenEntries, Key, ScoredTensors, largest_entries
from graftc.specs.methods.mask import Mask


class MaskMethod(ScoredTensors[Mask]):
    """See `ScoredTensors`."""

    def scoring(self, spec: Mask) -> Scoring | None:
        """Examples choose by Fisher information and by movement."""
        return {"fish": Fisher(), "movement": Movement()}.get(spec.selection)

    def each(self, spec: Mask) -> bool:
        """See `ScoredTensors.each`."""
        return spec.allocation == "per_tensor"

    def choose(self, spec: Mask, regions: Mapping[Key, WeightSlice], build: Builder) -> ChosenEntries:
        """The largest entries by magnitude; random ones for every other selection, until examples are looked at."""
        if spec.selection != "magnitude" or build.without_values:
            return super().choose(spec, regions, build)
        return largest_entries(
            spec,
            regions,
            lambda key: regions[key].entries(build.store.get(key[0]).detach()).abs(),
            each=self.each(spec),
        )
