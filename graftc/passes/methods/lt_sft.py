"""LT-SFT: train all entries, rewind, and train those that changed most (Ansell et al. 2022, arXiv:2110.07560)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from graftc.passes.core.build.builder import Builder
from graftc.passes.core.build.tensors import tensor_name
from graftc.passes.core.method.capabilities import Staged, Transition
from graftc.passes.core.method.entry_selection import largest
from graftc.passes.core.method.steering import AdaptedSite, TensorObjective, wide, zero_state
from graftc.passes.core.ops.sparse import written
from graftc.passes.core.weights.folds import Fold, StandIn
from graftc.passes.core.weights.weight_slice import WeightSlice
from graftc.passes.methods.bases.sparse import ChosenEntries, SparseTensors, budget_of, entry_values, regions_at
from graftc.passes.methods.full import Stored
from graftc.specs.methods.lt_sft import LTSFT

KEPT = ("indices", "start")
"""Suffixes of the buffers that hold, during a dense run, the entries chosen by earlier iterations and their deltas."""


class Distance(TensorObjective[LTSFT]):
    """``penalty * mean |W' - W|`` over all entries of the target, chosen or not."""

    @classmethod
    def wanted(cls, spec: LTSFT) -> bool:
        """Return whether the penalty is above zero."""
        return spec.penalty > 0

    def value(self) -> Tensor:
        """Return the penalty times the mean absolute change over all entries of the target."""
        total, size = torch.zeros(()), 0
        for place, region in regions_at(self.places):
            base, tensors = place.base[region.tensor], place.tensors
            size += region.size
            if self.spec.dense:
                own = region.entries(base).to(tensors[region.part].dtype)
                total = total.to(own.device) + (_own(place, region) - own).abs().sum()
            elif f"{region.part}_delta" in tensors:
                total = total.to(base.device) + tensors[f"{region.part}_delta"].abs().sum()
        return self.spec.penalty * total / size


class LTSFTMethod(SparseTensors[LTSFT], Staged[LTSFT]):
    """Trains copies of the target's tensors in dense training runs, and uses `SparseTensors` in sparse ones."""

    objective = Distance

    def prepare(self, spec: LTSFT, sites: Sequence[Stored], build: Builder) -> ChosenEntries:
        """Select the entries for a sparse training run; a dense one selects none."""
        if not spec.dense:
            return super().prepare(spec, sites, build)
        budget_of(spec, sum(region.size for _, region in self.tensors_of(sites, build.store).values()))
        return ChosenEntries({}, {})

    def place(self, spec: LTSFT, site: Stored, region: WeightSlice, shared: ChosenEntries, build: Builder) -> None:
        """Replace part of a tensor with a trained copy or, in a sparse training run, with a sum of base and deltas."""
        if not spec.dense:
            super().place(spec, site, region, shared, build)
            return
        build.overlay(region)
        for kind in KEPT:
            part = f"{region.part}_{kind}"
            known = build.known(tensor_name(site, build.adaptation, part))
            if known is not None:
                build.keep_buffer(part, zero_state(known.shape, known.dtype))

    def fold(self, spec: LTSFT, site: Stored, tensors: Mapping[str, Tensor]) -> Fold:
        """Fold the sums into the base's tensors or, in a dense run, replace them with the trained copies."""
        return StandIn() if spec.dense else super().fold(spec, site, tensors)

    def stages(self, spec: LTSFT) -> int:
        """Return the number of training runs: a dense and a sparse one for each iteration."""
        return 2 * spec.iterations

    def advance(
        self, spec: LTSFT, places: Sequence[AdaptedSite[LTSFT]], shared: Mapping[str, Tensor]
    ) -> Transition[LTSFT]:
        """Start the next training run from the results of the current one.

        After a dense run, the entries that changed most are chosen and everything is rewound; after a sparse run, all
        tensors start from their trained values.
        """
        following = spec.model_copy(update={"stage": spec.stage + 1})
        if spec.dense:
            return Transition(following, self._chosen(spec, places), rewind=True)
        values: dict[str, Tensor] = {}
        for place, region in regions_at(places):
            values |= _dense_values(spec, place, region)
        return Transition(following, values)

    def _chosen(self, spec: LTSFT, places: Sequence[AdaptedSite[LTSFT]]) -> dict[str, Tensor]:
        """Return the initial tensors of a sparse run: the entries chosen so far, and those that changed most."""
        regions = list(regions_at(places))
        budget = budget_of(spec, sum(region.size for _, region in regions))
        new = budget * spec.iteration // spec.iterations - budget * (spec.iteration - 1) // spec.iterations
        numbers = largest([partial(_changes, place, region) for place, region in regions], new)
        values: dict[str, Tensor] = {}
        for (place, region), own in zip(regions, numbers, strict=True):
            before, start = _before(place, region)
            both = torch.cat([before, own])
            delta = torch.cat([start, start.new_zeros(own.shape)])
            values |= entry_values(place, region, both, delta)
        return values


def _own(place: AdaptedSite[LTSFT], region: WeightSlice) -> Tensor:
    """Return the trained copy of part of a tensor, flattened in the order of the part's entries."""
    return place.tensors[region.part].reshape(-1)


def _before(place: AdaptedSite[LTSFT], region: WeightSlice) -> tuple[Tensor, Tensor]:
    """Return the entries chosen by earlier iterations, and their initial differences from the base."""
    tensors = place.tensors
    if f"{region.part}_indices" not in tensors:
        device = place.base[region.tensor].device
        return torch.empty(0, dtype=torch.int64, device=device), torch.empty(0, device=device)
    indices, start = (tensors[f"{region.part}_{kind}"] for kind in KEPT)
    return region.numbers(indices), start


def _changes(place: AdaptedSite[LTSFT], region: WeightSlice) -> Tensor:
    """Return how far each entry has moved in a dense training run; -1 for entries that were already chosen."""
    base = place.base[region.tensor].detach()
    before, start = _before(place, region)
    if before.numel():
        base = written(base, region.places(before), start)
    moved = (wide(_own(place, region).detach()) - wide(region.entries(base))).abs()
    return moved.index_fill(0, before, -1.0)


def _dense_values(spec: LTSFT, place: AdaptedSite[LTSFT], region: WeightSlice) -> dict[str, Tensor]:
    """Return one tensor's initial values for a dense training run that follows a sparse one."""
    base, tensors, name = place.base[region.tensor].detach(), place.tensors, str(spec.name)
    if f"{region.part}_delta" not in tensors:
        return {}
    indices, delta = tensors[f"{region.part}_indices"], tensors[f"{region.part}_delta"].detach()
    trained = region.take(written(base, indices, delta))
    parts = {region.part: trained, f"{region.part}_indices": indices, f"{region.part}_start": delta}
    return {tensor_name(place.site, name, part): value.clone() for part, value in parts.items()}
