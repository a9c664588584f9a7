"""Diff pruning: training gated differences, then only the largest of them (arXiv:2012.07463)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, fx
from torch.utils.checkpoint import checkpoint

from graftc.passes.core.build.builder import Builder
from graftc.passes.core.build.operations import drawn_beside
from graftc.passes.core.method.capabilities import Resized, Staged, Transition
from graftc.passes.core.method.entry_selection import largest
from graftc.passes.core.method.lowrank import constant, zeros
from graftc.passes.core.method.steering import AdaptedSite, TensorObjective
from graftc.passes.core.ops.hashing import SEEDS
from graftc.passes.core.sites.sites import LinearSite, Site
from graftc.passes.core.weights.folds import Fold, TensorFold
from graftc.passes.core.weights.weight_slice import WeightSlice
from graftc.passes.methods.bases.sparse import ChosenEntries, SparseTensors, budget_of, entry_values, regions_at
from graftc.passes.methods.full import Stored
from graftc.specs.methods.diff_pruning import DiffPruning

aten = torch.ops.aten


class OpenGates(TensorObjective[DiffPruning]):
    """``penalty * sum P(z > 0)`` over the gates of all entries and all tensors."""

    @classmethod
    def wanted(cls, spec: DiffPruning) -> bool:
        """Return whether this is the first training run and its penalty is above zero."""
        return spec.stage == 1 and spec.penalty > 0

    def value(self) -> Tensor:
        """Return the penalty times the sum of the probabilities that gates are open."""
        terms = [self._of(place.tensors, part) for place in self.places for part in _tensors_of(place.tensors)]
        return self.spec.penalty * torch.stack(terms).sum()

    def _of(self, tensors: Mapping[str, Tensor], part: str) -> Tensor:
        # Recomputed in the backward pass, since storing the result would take as much memory as the gates.
        entries = checkpoint(
            self._open,
            tensors[f"{part}_alpha"],
            use_reentrant=False,
            preserve_rng_state=False,
            determinism_check="none",
        )
        assert isinstance(entries, Tensor)
        if not self.spec.structured:
            return entries
        group = self._open(tensors[f"{part}_group"])
        return entries + group if self.spec.group_penalty == "sum" else entries * group

    def _open(self, alpha: Tensor) -> Tensor:
        return torch.sigmoid(alpha - self.spec.shift).sum()


class DiffPruningMethod(SparseTensors[DiffPruning], Staged[DiffPruning], Resized[DiffPruning]):
    """``W' = W + z z_group w`` for every tensor, then ``W + scatter(indices, delta)`` for the remaining entries.

    `graftc::gated_weight` is inserted wherever a tensor is read. If a site owns only some rows of a tensor, its
    parameters have the size of those rows, which form a separate group. The second training run uses `SparseTensors`.
    """

    objective = OpenGates

    def prepare(self, spec: DiffPruning, sites: Sequence[Stored], build: Builder) -> ChosenEntries:
        """Assign every entry a difference in the first training run; select entries for the second.

        Raises:
            GraftError: GC020 if the budget is zero or exceeds the number of entries in the target.
        """
        if spec.stage > 1:
            return super().prepare(spec, sites, build)
        counts = {key: region.size for key, (_, region) in self.tensors_of(sites, build.store).items()}
        budget_of(spec, sum(counts.values()))
        return ChosenEntries(counts, {})

    def place(
        self, spec: DiffPruning, site: Stored, region: WeightSlice, shared: ChosenEntries, build: Builder
    ) -> None:
        """Replace part of a tensor with its gated version, or only the remaining entries in the second training run."""
        if spec.stage > 1:
            super().place(spec, site, region, shared, build)
        else:
            build.stand_in(region, partial(_gated, spec, build, region), within=True)

    def fold(self, spec: DiffPruning, site: Stored, tensors: Mapping[str, Tensor]) -> Fold:
        """Fold the sums into the base's tensors, using gates without noise."""
        if spec.stage > 1:
            return super().fold(spec, site, tensors)
        return TensorFold({p: _added(site, p, partial(difference, spec, tensors, p)) for p in _tensors_of(tensors)})

    def stages(self, spec: DiffPruning) -> int:
        """Return 2: a training run with gates, and one for the remaining entries."""
        return 2

    @torch.no_grad()
    def advance(
        self, spec: DiffPruning, places: Sequence[AdaptedSite[DiffPruning]], shared: Mapping[str, Tensor]
    ) -> Transition[DiffPruning]:
        """Start the second training run from the entries with the largest differences, at their current values."""
        regions = list(regions_at(places, biases=self.biases))
        sizes = [partial(_magnitude, spec, place.tensors, region.part) for place, region in regions]
        chosen = largest(sizes, budget_of(spec, _entries(places)))
        values: dict[str, Tensor] = {}
        for (place, region), numbers in zip(regions, chosen, strict=True):
            own = difference(spec, place.tensors, region.part).reshape(-1)
            values |= entry_values(place, region, numbers, own[numbers])
        return Transition(spec.model_copy(update={"stage": spec.stage + 1}), values)

    def deployed(self, spec: DiffPruning, places: Sequence[AdaptedSite[DiffPruning]]) -> int | None:
        """Return the number of entries that remain for the second training run; None if that is the current run."""
        return budget_of(spec, _entries(places)) if spec.stage == 1 else None


def difference(spec: DiffPruning, tensors: Mapping[str, Tensor], part: str) -> Tensor:
    """Return ``z z_group w`` for a tensor, using gates without noise."""
    low, high = spec.stretch

    def gate(alpha: Tensor) -> Tensor:
        return torch.clamp(torch.sigmoid(alpha) * (high - low) + low, 0, 1)

    own = gate(tensors[f"{part}_alpha"]) * tensors[f"{part}_w"]
    return gate(tensors[f"{part}_group"]) * own if spec.structured else own


def _magnitude(spec: DiffPruning, tensors: Mapping[str, Tensor], part: str) -> Tensor:
    return difference(spec, tensors, part).abs().reshape(-1)


def _tensors_of(tensors: Mapping[str, Tensor]) -> list[str]:
    """Return the names of the base's tensors for which a place has differences."""
    return [name.removesuffix("_w") for name in tensors if name.endswith("_w")]


def _entries(places: Sequence[AdaptedSite[DiffPruning]]) -> int:
    return sum(p.tensors[f"{part}_w"].numel() for p in places for part in _tensors_of(p.tensors))


def _gated(spec: DiffPruning, build: Builder, region: WeightSlice, tensor: fx.Node) -> fx.Node:
    dtype = torch.promote_types(build.store.get(region.tensor).dtype, torch.float32)
    part, shape, start = region.part, region.own_shape, constant(spec.initial_alpha)
    w = build.parameter(f"{part}_w", shape, zeros, dtype=dtype)
    alpha = build.parameter(f"{part}_alpha", shape, start, dtype=dtype)
    group = build.parameter(f"{part}_group", (1,), start, dtype=dtype) if spec.structured else None
    seed = drawn_beside(build, tensor, SEEDS, "seed")
    return build.call(torch.ops.graftc.gated_weight.default, tensor, w, alpha, group, seed, *spec.stretch, part=part)


def _added(site: Site, part: str, own: Callable[[], Tensor]) -> Callable[[Tensor], Tensor]:
    """Return a function that adds ``own()`` to the part of a stored tensor that the site owns."""
    parts = {region.part: region for region in site.slices} if isinstance(site, LinearSite) else {}

    def change(tensor: Tensor) -> Tensor:
        where = parts.get(part) or WeightSlice.every(part, tensor)
        return where.put(tensor, where.take(tensor) + own())

    return change
