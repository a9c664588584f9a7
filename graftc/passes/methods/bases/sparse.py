"""Training selected entries of base tensors, stored as indices and deltas; only the deltas are parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar, TypeVar

import torch
from torch import Tensor, fx

from graftc.passes.core.build.builder import Builder
from graftc.passes.core.build.tensors import tensor_name
from graftc.passes.core.method.capabilities import Reselecting, Scored, Transition
from graftc.passes.core.method.entry_selection import drawn, largest, shares
from graftc.passes.core.method.lowrank import zeros
from graftc.passes.core.method.method import Method
from graftc.passes.core.method.steering import AdaptedSite, zero_state
from graftc.passes.core.sites.site_slices import slices_of
from graftc.passes.core.sites.sites import LinearSite, NormSite, ParameterSite, Site
from graftc.passes.core.weights.folds import Fold, TensorFold
from graftc.passes.core.weights.store import Store
from graftc.passes.core.weights.weight_slice import WeightSlice
from graftc.passes.methods.full import Stored
from graftc.specs.errors.diagnostics import GraftError, Place
from graftc.specs.methods.bases.sparse import BudgetSpec

S = TypeVar("S", bound=BudgetSpec)
Owner = TypeVar("Owner")
SELECTED = "selected"
"""Part name of the buffer that records whether entries have been chosen by examples."""

Key = tuple[str, str]
"""The Store name of a tensor, and its rows as text."""


@dataclass(frozen=True)
class ChosenEntries:
    """The entries that an adaptation selects.

    Attributes:
        counts: number of entries of each tensor.
        indices: the entries of each tensor if they are newly selected; otherwise empty, since they exist already.
        placed: tensors that have been replaced in this Program.
    """

    counts: Mapping[Key, int]
    indices: Mapping[Key, Tensor]
    placed: set[Key] = field(default_factory=set)


class SparseTensors(Method[S, Stored]):
    """``W' = W + scatter(indices, delta)`` for tensors of the base, wherever they are read.

    For every tensor with a selected entry, ``<tensor>_indices: int32[k]`` (``int64`` for 2^31 entries or more)
    contains indices into the stored tensor, in ascending order, and ``<tensor>_delta: f32[k]`` is initially zero. A
    subclass determines which entries are selected.
    """

    stands_in = True
    biases: ClassVar[bool] = True
    """Whether entries of maps' biases are selected as well."""

    def applies(self, spec: S, site: Site) -> bool:
        """Return whether the site has tensors; output heads are excluded."""
        return isinstance(site, LinearSite | NormSite | ParameterSite) and not site.is_head

    def prepare(self, spec: S, sites: Sequence[Stored], build: Builder) -> ChosenEntries:
        """Select the entries, unless they have already been selected.

        Raises:
            GraftError: GC020 if the budget is zero or exceeds the number of entries in the target; GC053 for given
                indices that are not valid for their tensor.
        """
        if isinstance(self, Scored) and self.scoring(spec) is not None:
            build.keep_buffer(SELECTED, zero_state([1], torch.bool))
        places = self.tensors_of(sites, build.store)
        names = {key: tensor_name(site, build.adaptation, f"{r.part}_indices") for key, (site, r) in places.items()}
        known = {key: build.known(name) for key, name in names.items()}
        regions = {key: region for key, (_, region) in places.items()}
        if not any(indices is not None for indices in known.values()):
            return self.choose(spec, regions, build)
        for key, indices in known.items():
            if indices is not None and names[key] in build.values:
                self._check(names[key], regions[key], indices)
        return ChosenEntries({key: 0 if own is None else own.numel() for key, own in known.items()}, {})

    def tensors_of(
        self, sites: Sequence[Stored], store: Store | Mapping[str, Tensor]
    ) -> dict[Key, tuple[Stored, WeightSlice]]:
        """Return all tensors, each once, with the first site that has it."""
        every = _each_once(sites, lambda site: slices_of(site, store, biases=self.biases))
        return {key_of(region): (site, region) for site, region in every}

    def _check(self, name: str, region: WeightSlice, indices: Tensor) -> None:
        """Check given indices, since kernels use them unchecked."""
        if indices.device.type == "meta":
            return
        ordered = indices.sort().values if isinstance(self, Reselecting) else indices
        good = indices.dim() == 1 and not indices.is_floating_point() and bool((ordered[1:] > ordered[:-1]).all())
        if not good or not (int(ordered[0]) >= 0 and int(ordered[-1]) < region.numel):
            order = "distinct" if isinstance(self, Reselecting) else "ascending"
            raise GraftError("GC053", f"{name} must contain {order} indices below {region.numel}")

    def choose(self, spec: S, regions: Mapping[Key, WeightSlice], build: Builder) -> ChosenEntries:
        """Choose the initial entries at random; each tensor gets a number proportional to its size."""
        sizes = [region.size for region in regions.values()]
        counts = dict(zip(regions, shares(budget_of(spec, sum(sizes)), sizes), strict=True))
        return ChosenEntries(counts, {} if build.without_values else random_entries(counts, regions, build))

    def insert(self, spec: S, site: Stored, shared: ChosenEntries, build: Builder) -> None:
        """Replace the base's tensors at the site with the changed ones.

        Raises:
            GraftError: GC021 if another adaptation trains one of them as a whole, or treats it as a constant.
        """
        for region in slices_of(site, build.store, biases=self.biases):
            if key_of(region) not in shared.placed:
                shared.placed.add(key_of(region))
                self.place(spec, site, region, shared, build)

    def place(self, spec: S, site: Stored, region: WeightSlice, shared: ChosenEntries, build: Builder) -> None:
        """Replace part of a base tensor, once per Program, if any of its entries are trained."""
        if shared.counts[key_of(region)]:
            build.stand_in(region, partial(self._changed, build, region, shared))

    def _changed(self, build: Builder, region: WeightSlice, shared: ChosenEntries, tensor: fx.Node) -> fx.Node:
        count, numbers = shared.counts[key_of(region)], shared.indices.get(key_of(region))
        indices = build.buffer(f"{region.part}_indices", partial(_placed, region, numbers, count))
        wide = torch.promote_types(build.store.get(region.tensor).dtype, torch.float32)
        delta = build.parameter(f"{region.part}_delta", (count,), zeros, dtype=wide)
        return build.call(torch.ops.graftc.sparse_weight.default, tensor, indices, delta, part=region.part)

    def fold(self, spec: S, site: Stored, tensors: Mapping[str, Tensor]) -> Fold:
        """Fold the sums into the base's tensors."""
        parts = [name.removesuffix("_delta") for name in tensors if name.endswith("_delta")]
        return TensorFold({part: partial(_added, tensors, part) for part in parts})


class ScoredTensors(SparseTensors[S], Scored[S]):
    """`SparseTensors` whose entries may be chosen by examples: the entries with the greatest scores are selected."""

    def scored(self, places: Sequence[AdaptedSite[S]]) -> Sequence[str]:
        """Return the names of the base's tensors at the places, each once."""
        return list(dict.fromkeys(region.tensor for _, region in regions_at(places, biases=self.biases)))

    def selected(self, spec: S, places: Sequence[AdaptedSite[S]], scores: Mapping[str, Tensor]) -> Transition[S]:
        """Select the entries with the greatest scores."""
        placed = {key_of(region): (place, region) for place, region in regions_at(places, biases=self.biases)}
        regions = {key: region for key, (_, region) in placed.items()}
        chosen = largest_entries(spec, regions, lambda key: regions[key].entries(scores[key[0]]), each=self.each(spec))
        values = {tensor_name(None, str(spec.name), SELECTED): torch.ones(1, dtype=torch.bool)}
        for key, (place, region) in placed.items():
            values |= entry_values(place, region, chosen.indices[key])
        return Transition(spec, values)

    def each(self, spec: S) -> bool:
        """Return whether each tensor gets a number of entries proportional to its size."""
        return False


def budget_of(spec: BudgetSpec, total: int) -> int:
    """Return the number of entries to train, out of ``total``.

    Raises:
        GraftError: GC020 if that is zero or more than ``total``.
    """
    count = spec.budget(total)
    if 0 < count <= total:
        return count
    field = spec.budget_field
    message = f"{spec.method} would train {count} of the target's {total} entries"
    raise GraftError("GC020", message, place=Place(path=field), hint=f"{'raise' if not count else 'lower'} {field}")


def regions_at(
    places: Sequence[AdaptedSite[S]], *, biases: bool = True
) -> Iterator[tuple[AdaptedSite[S], WeightSlice]]:
    """Iterate over the tensors at places, each once, with the first place that has it."""
    return _each_once(places, lambda place: slices_of(place.site, place.base, biases=biases))


def _each_once(
    owners: Sequence[Owner], slices: Callable[[Owner], Iterable[WeightSlice]]
) -> Iterator[tuple[Owner, WeightSlice]]:
    """Yield each part of a tensor once, with its first owner."""
    seen: set[Key] = set()
    for owner in owners:
        for region in slices(owner):
            if key_of(region) not in seen:
                seen.add(key_of(region))
                yield owner, region


def entry_values(
    place: AdaptedSite[S], region: WeightSlice, numbers: Tensor, delta: Tensor | None = None
) -> dict[str, Tensor]:
    """Return the tensors for entries of one tensor, by their Store names; none if there are no entries.

    Args:
        place: the place of the tensor.
        region: the part of the tensor.
        numbers: indices of entries within that part.
        delta: the deltas of these entries; zeros by default.
    """
    if not numbers.numel():
        return {}
    indices, order = region.places(numbers).sort()
    wide = torch.promote_types(place.base[region.tensor].dtype, torch.float32)
    start = torch.zeros(numbers.shape, device=numbers.device) if delta is None else delta[order]
    names = (tensor_name(place.site, str(place.spec.name), f"{region.part}_{kind}") for kind in ("indices", "delta"))
    return dict(zip(names, (indices, start.to(wide)), strict=True))


def random_entries(counts: Mapping[Key, int], regions: Mapping[Key, WeightSlice], build: Builder) -> dict[Key, Tensor]:
    """Draw ``counts`` entries of the tensors; draws depend only on the seed and the adaptation's and tensors' names."""
    return {
        key: drawn(count, regions[key].size, build.generator(f"{build.adaptation}:{key[0]}:{key[1]}"))
        for key, count in counts.items()
        if count
    }


def largest_entries(
    spec: BudgetSpec, regions: Mapping[Key, WeightSlice], score: Callable[[Key], Tensor], *, each: bool = False
) -> ChosenEntries:
    """Choose the entries with the greatest scores.

    They are chosen from all tensors together or, if ``each`` is true, from every tensor in proportion to its size.
    """
    sizes = [region.size for region in regions.values()]
    count = budget_of(spec, sum(sizes))
    makers = [partial(score, key) for key in regions]
    if each:
        chosen = [largest([m], own)[0] for m, own in zip(makers, shares(count, sizes), strict=True)]
    else:
        chosen = largest(makers, count)
    return ChosenEntries(
        {k: n.numel() for k, n in zip(regions, chosen, strict=True)}, dict(zip(regions, chosen, strict=True))
    )


def key_of(region: WeightSlice) -> Key:
    """Return the key that distinguishes part of a tensor from other parts."""
    return region.tensor, str(region)


def _placed(region: WeightSlice, numbers: Tensor | None, count: int, device: torch.device) -> Tensor:
    """Return the entries' indices into the stored tensor.

    If ``numbers`` is None, as on the meta device or when the tensors are given, the result is zeros, whose values do
    not matter.
    """
    if numbers is None:
        return torch.zeros(count, dtype=region.index_dtype, device=device)
    return region.places(numbers).sort().values.to(device)


def _added(tensors: Mapping[str, Tensor], part: str, tensor: Tensor) -> Tensor:
    """Return a base tensor, float64, with its deltas added."""
    indices, delta = tensors[f"{part}_indices"].long(), tensors[f"{part}_delta"]
    return tensor.reshape(-1).index_add(0, indices, delta.to(tensor.dtype)).reshape(tensor.shape)
