"""Places: the adaptations of the same rows of one stored weight, folded block by block, with evidence."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from graftc.compiler.folding.rounding import furthest, largest
from graftc.passes.core.method.capabilities import RowWise
from graftc.passes.core.method.folding import fold_at
from graftc.passes.core.method.registry import method_for
from graftc.passes.core.sites.sites import SiteKey
from graftc.passes.core.weights.folds import Keep, WeightFold
from graftc.passes.core.weights.weight_slice import WeightSlice
from graftc.records.certificate import Retention, SiteEvidence
from graftc.runtime.streaming.unfolded import BlockMap, BlockMaps
from graftc.runtime.streaming.update import Replacement, SiteUpdate
from graftc.specs.errors.diagnostics import GraftError

__all__ = ["FoldPlace", "FoldedBlock", "PlaceFold", "ReplacedFold", "places_of"]

BLOCK = 2**20
"""The number of entries of a weight in memory in float64 at a time, if its adaptations fold row by row."""


@dataclass(frozen=True)
class FoldPlace:
    """All adaptations of the same rows of one weight, in order.

    Attributes:
        chain: one or more updates of equal slices.
    """

    chain: tuple[SiteUpdate, ...]

    @property
    def weight(self) -> WeightSlice:
        """The adapted rows of the weight."""
        return self.chain[0].weight

    @property
    def bias(self) -> WeightSlice | None:
        """The same rows of the bias; None if there is none."""
        return self.chain[0].bias

    @property
    def site(self) -> str:
        """The site, as text."""
        return self.chain[0].site

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the adaptations."""
        return tuple(update.adaptation for update in self.chain)

    @property
    def row_wise(self) -> bool:
        """Whether each row folds independently of the others."""
        return all(isinstance(method_for(update.spec.method), RowWise) for update in self.chain)

    @property
    def rows_per_block(self) -> int:
        """The number of rows that fold at a time: all of them unless they fold independently."""
        if not self.row_wise:
            return self.weight.count
        least = 1
        for update in self.chain:
            method = method_for(update.spec.method)
            assert isinstance(method, RowWise)
            least = max(least, method.fewest_rows(update.spec))
        # Blocks are nearly equal: if there are several, none has less than half of the rows that fit.
        return max(2 * least, BLOCK // max(1, self.weight.in_features))


def places_of(updates: Iterable[SiteUpdate]) -> list[FoldPlace]:
    """Group updates by the rows that they change, in order.

    Raises:
        GraftError: GC021 for rows that overlap and are not the same.
    """
    chains: dict[WeightSlice, list[SiteUpdate]] = {}
    slices: dict[str, list[WeightSlice]] = {}  # by tensor: those of other tensors cannot overlap
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
    return [FoldPlace(tuple(chain)) for chain in chains.values()]


@dataclass(frozen=True)
class FoldedBlock:
    """Some rows of a place, folded.

    Attributes:
        own: the rows of the stored weight.
        base: their values before folding, ``float64[rows, in]``.
        exact: their values after folding, float64.
        bias: the same rows of the bias, and their values before and after; None if folding does not change the bias.
    """

    own: WeightSlice
    base: Tensor
    exact: Tensor
    bias: tuple[WeightSlice, Tensor, Tensor] | None


@dataclass
class Held:
    """Stored values compared with exact ones: the largest rounding error, and how much of the update is left."""

    rounding: float = field(default=0.0, kw_only=True)
    retention: Retention = field(default_factory=Retention, kw_only=True)

    def note(self, result: tuple[float, Retention]) -> None:
        """Add the results for some entries."""
        self.rounding = largest(self.rounding, result[0])
        self.retention += result[1]


@dataclass
class ReplacedFold(Held):
    """A trained copy that replaces a tensor, and the evidence."""

    replacement: Replacement
    change: float = 0.0

    @property
    def evidence(self) -> SiteEvidence:
        """The evidence so far; copying involves no algebra."""
        return SiteEvidence(
            self.replacement.tensor, (self.replacement.adaptation,), self.change, 0.0, self.rounding, self.retention
        )

    def blocks(self, rows: WeightSlice, stored: Tensor) -> Iterator[tuple[WeightSlice, Tensor, Tensor]]:
        """Yield rows of the tensor with their values before and after, ``float64``.

        Args:
            rows: the rows in which nothing else is written.
            stored: the base's tensor.
        """
        for _, own in rows.blocks(max(1, BLOCK // max(1, rows.size // max(1, rows.count)))):
            before, after = _rows(own, stored), _rows(own, self.replacement.value)
            self.change = largest(self.change, furthest(before, after))
            yield own, before, after


@dataclass
class PlaceFold(Held):
    """The fold of one place, and the evidence that is gathered on the way.

    Attributes:
        place: the place.
        maps: compiled maps to compare the fold with.
    """

    place: FoldPlace
    maps: BlockMaps
    change: float = 0.0
    error: float = 0.0
    scale: float = 1e-30
    _parts: dict[str, dict[str, Tensor]] = field(default_factory=dict, repr=False)

    @property
    def evidence(self) -> SiteEvidence:
        """The evidence so far."""
        place = self.place
        error = self.error / self.scale
        return SiteEvidence(place.site, place.names, self.change, error, self.rounding, self.retention)

    def blocks(self, weight: Tensor, bias: Tensor | None) -> Iterator[FoldedBlock]:
        """Yield the rows of the place, folded and probed block by block.

        Args:
            weight: the stored weight, or the copy that replaces it, in any floating-point type.
            bias: the same for the bias.

        Raises:
            GraftError: GC050 if an adaptation cannot fold, GC071 for a method's mistake, GC103 for what is not a change
                of the place's rows or of a bias that it has.
        """
        place = self.place
        for start, own in place.weight.blocks(place.rows_per_block):
            base = _rows(own, weight)
            own_bias = None if place.bias is None else place.bias.at(own.rows)
            base_bias = None if own_bias is None or bias is None else _rows(own_bias, bias)
            exact, exact_bias = self._probed(start, own, base, base_bias)
            changed = exact_bias is not None and (base_bias is None or not torch.equal(exact_bias, base_bias))
            if changed and (own_bias is None or base_bias is None):
                message = f"{place.names[-1]!r} needs a bias, and {place.site} has none"
                raise GraftError("GC103", message)
            changed_bias = (own_bias, base_bias, exact_bias) if changed else None
            yield FoldedBlock(own, base, exact, changed_bias)  # type: ignore[arg-type]
        self._parts.clear()

    def _probed(self, start: int, own: WeightSlice, base: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        block = self.maps.of(self.place.chain, own.count)
        parts = {update.adaptation: self._cut(update, start, own.count) for update in self.place.chain}
        constants = {update.adaptation: self._constants(update, base) for update in self.place.chain}
        every = {name: {**constants[name], **tensors} for name, tensors in parts.items()}
        unfolded = block.unfolded(base, bias, every)
        before = block.plain(base, bias)
        self.change = largest(self.change, furthest(unfolded, before))
        self.scale = largest(self.scale, float(unfolded.abs().max()))
        exact, exact_bias = base.clone(), None if bias is None else bias.clone()
        for update in self.place.chain:
            exact, exact_bias = self._folded(block, update, parts[update.adaptation], exact, exact_bias)
        self.error = largest(self.error, furthest(unfolded, block.plain(exact, exact_bias)))
        return exact, exact_bias

    def _folded(
        self, block: BlockMap, update: SiteUpdate, parts: Mapping[str, Tensor], weight: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        method: Any = method_for(update.spec.method)
        site = replace(block.site, key=SiteKey("", update.site))
        fold = fold_at(method, update.spec, site, parts)
        if isinstance(fold, WeightFold):
            return fold.apply(weight, bias)
        if isinstance(fold, Keep):
            raise GraftError("GC050", f"{update.adaptation!r} cannot fold at {update.site}: {fold.reason}")
        raise GraftError("GC103", f"{update.adaptation!r} is not a change of the rows of {update.site}")

    def _cut(self, update: SiteUpdate, start: int, count: int) -> dict[str, Tensor]:
        """Return the tensors that a block of rows folds with, floating-point ones in float64."""
        method = method_for(update.spec.method)
        axes = method.row_axes(update.spec) if isinstance(method, RowWise) else {}
        if update.adaptation not in self._parts:
            read = update.parts.items()
            self._parts[update.adaptation] = {p: t if p in axes else _widened(t) for p, t in read}
        tensors = self._parts[update.adaptation]
        return {p: _widened(t.narrow(axes[p], start, count)) if p in axes else t for p, t in tensors.items()}

    def _constants(self, update: SiteUpdate, base: Tensor) -> Mapping[str, Tensor]:
        method = method_for(update.spec.method)
        return method.from_weight(update.spec, base) if isinstance(method, RowWise) else {}


def _rows(own: WeightSlice, stored: Tensor) -> Tensor:
    """Return a copy of a slice's rows in float64, as the map uses them."""
    views = own.views(stored)
    return (views[0] if len(views) == 1 else torch.cat(views, own.row_axis)).to(torch.float64, copy=True)


def _widened(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor
