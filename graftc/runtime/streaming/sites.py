"""Sites of a checkpoint: rows of stored weights, with all updates to them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from graftc.compiler.folding.one_map import OneMap, one_map
from graftc.passes.core.method.capabilities import RowWise
from graftc.passes.core.method.registry import method_for
from graftc.passes.core.weights.weight_slice import WeightSlice
from graftc.runtime.streaming.update import SiteUpdate
from graftc.specs.base import MethodSpec
from graftc.specs.errors.diagnostics import GraftError

BLOCK = 2**20
"""The number of a weight's entries held in memory in float64 at a time, if its adaptations fold row by row."""


def rows_that_fit(columns: int) -> int:
    """Return how many rows of a weight with the given number of columns are held in memory at a time."""
    return max(1, BLOCK // max(1, columns))


@dataclass(frozen=True)
class FileSite:
    """Rows of one weight, together with all adaptations of these rows.

    Attributes:
        updates: one or more updates to the same slice, in order.
    """

    updates: tuple[SiteUpdate, ...]

    @property
    def weight(self) -> WeightSlice:
        """The adapted rows of the weight."""
        return self.updates[0].weight

    @property
    def slices(self) -> tuple[WeightSlice, ...]:
        """The weight's rows, and the bias's if there is one."""
        bias = self.updates[0].bias
        return (self.weight,) if bias is None else (self.weight, bias)

    @property
    def name(self) -> str:
        """The site, as text."""
        return self.updates[0].site

    @property
    def adaptations(self) -> tuple[str, ...]:
        """The adaptations' names."""
        return tuple(update.adaptation for update in self.updates)

    @property
    def rows_per_block(self) -> int:
        """The number of rows that fold at a time: all of the site's rows unless they fold independently."""
        least = 1
        for update in self.updates:
            method = method_for(update.spec.method)
            if not isinstance(method, RowWise):
                return self.weight.count
            least = max(least, method.fewest_rows(update.spec))
        # Blocks have nearly equal sizes: if there are several, none has less than half of the rows that fit.
        return max(2 * least, rows_that_fit(self.weight.in_features))

    @cached_property
    def kind(self) -> str:
        """Text that is equal for two sites if, for the same number of rows, they have the same map."""
        texts = [spec.model_dump(mode="json", exclude={"target", "overrides"}) for spec in self._specs]
        return json.dumps([self.weight.in_features, len(self.slices), self.updates[0].lookup, texts], sort_keys=True)

    @cached_property
    def _specs(self) -> list[MethodSpec]:
        return list(map(_without_biases, self.updates))

    def block(self, rows: int) -> OneMap:
        """Return the map of the given number of rows, without values.

        Raises:
            GraftError: as in `one_map`.
        """
        columns, lookup = self.weight.in_features, self.updates[0].lookup
        return one_map(self._specs, rows, columns, bias=len(self.slices) > 1, lookup=lookup)


def _without_biases(update: SiteUpdate) -> MethodSpec:
    """Return an update's spec without its trained biases, which are replaced as a whole."""
    biases = getattr(update.spec, "bias", None) in ("all", "lora_only")
    return update.spec.model_copy(update={"name": update.adaptation, **({"bias": "none"} if biases else {})})


def sites_of(updates: Iterable[SiteUpdate]) -> list[FileSite]:
    """Group updates by the rows that they change, in order.

    Raises:
        GraftError: GC021 for rows that overlap but are not the same.
    """
    chains: dict[WeightSlice, list[SiteUpdate]] = {}
    slices: dict[str, list[WeightSlice]] = {}  # by tensor: slices of different tensors cannot overlap
    for update in updates:
        weight = update.weight
        for own in slices.get(weight.tensor, ()):
            if own != weight and own.overlaps(weight):
                other = chains[own][0].adaptation
                message = f"{update.adaptation!r} and {other!r} change overlapping rows of {own.tensor}"
                raise GraftError("GC021", message)
        if weight not in chains:
            chains[weight] = []
            slices.setdefault(weight.tensor, []).append(weight)
        chains[weight].append(update)
    return [FileSite(tuple(chain)) for chain in chains.values()]
