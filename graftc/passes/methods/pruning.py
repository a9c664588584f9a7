"""Pruning by magnitude and by movement (Sanh et al. 2020), at once or in rounds."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cache, partial

import torch
from torch import Tensor, fx

from graftc.passes.core.build.builder import Builder
from graftc.passes.core.build.tensors import tensor_name
from graftc.passes.core.method.capabilities import Resized, Staged, Transition
from graftc.passes.core.method.lowrank import zeros
from graftc.passes.core.method.method import Method
from graftc.passes.core.method.steering import AdaptedSite, zero_state
from graftc.passes.core.ops.pruned import Edge, dropped, edge_of
from graftc.passes.core.sites.sites import LinearSite, Site
from graftc.passes.core.weights.folds import Fold, StandIn, TensorFold
from graftc.passes.core.weights.weight_slice import WeightSlice, index_type
from graftc.passes.methods.bases.pruning_controller import (
    PENALTY,
    Penalty,
    PruningMasks,
    deployed_of,
    left_of,
    logit,
    own_of,
    prunes,
    size_of,
    wide_of,
)
from graftc.passes.methods.bases.scheduled import check_phases
from graftc.specs.methods.pruning import Pruning, kept_of

aten = torch.ops.aten


@dataclass(frozen=True)
class Start:
    """The state that all sites start from.

    Attributes:
        edges: the initial edges by tensor and rows; empty if each matrix determines its own.
        kept: the entries that a later stage trains, by tensor and rows; empty under the same condition.
        placed: tensors that have been replaced in this Program.
    """

    edges: Mapping[WeightSlice, Edge] = field(default_factory=dict)
    kept: Mapping[WeightSlice, Tensor] = field(default_factory=dict)
    placed: set[WeightSlice] = field(default_factory=set)


class PruningMethod(Method[Pruning, LinearSite], Staged[Pruning], Resized[Pruning]):
    """``W' = W * M`` in place of ``W``, wherever it is read.

    The weight is trained as a copy. If scores are trained, they are stored as ``<tensor>_scores``, with the weight's
    shape. ``<tensor>_threshold`` and ``<tensor>_last``, one of each per matrix, determine which entries are kept. From
    the second stage on, ``<tensor>_indices: int32[k]`` (``int64`` for 2^31 entries or more) and ``<tensor>_values:
    [k]`` replace the copy and these tensors.
    """

    stands_in = True
    controller = PruningMasks
    objective = Penalty

    def applies(self, spec: Pruning, site: Site) -> bool:
        """Return whether the site is a linear map that is in a layer or named by the target, but not an output head."""
        every = spec.target.modules == "**" and spec.target.role is None and spec.target.regex is None
        return isinstance(site, LinearSite) and not site.is_head and (site.layer is not None or not every)

    def prepare(self, spec: Pruning, sites: Sequence[LinearSite], build: Builder) -> Start:
        """Compute the state that depends on all sites together.

        Raises:
            GraftError: GC026 if the phases leave none of the ``total_steps`` for pruning.
        """
        if spec.variant == "soft_movement":
            build.keep_buffer(PENALTY, zero_state([1]))
        if spec.total_steps is not None and prunes(spec):
            check_phases(spec, spec.total_steps)
        maps = {_key(site): site for site in sites}
        if spec.allocation != "global" or build.without_values or _is_known(spec, maps.values(), build):
            return Start()
        scores = {key: _magnitudes(_base(site, build)) for key, site in maps.items()}
        share = Fraction(str(spec.initial_density)) if spec.stage == 1 else spec.remaining(spec.stage - 1)
        kept = kept_of(sum(own.numel() for own in scores.values()), share)
        edges = dict(zip(scores, edge_of([own.flatten() for own in scores.values()], kept), strict=True))
        return Start(edges if spec.stage == 1 else {}, {k: _within(scores[k], [e]) for k, e in edges.items()})

    def insert(self, spec: Pruning, site: LinearSite, shared: Start, build: Builder) -> None:
        """Replace the weight with its pruned version.

        Raises:
            GraftError: GC021 if another adaptation also trains it.
        """
        if spec.stage == 1:
            build.overlay(site.own, through=partial(self._pruned, spec, site, shared, build))
        elif _key(site) not in shared.placed:
            shared.placed.add(_key(site))
            build.instead(site.own, partial(self._sparse, spec, site, shared, build))

    def _pruned(self, spec: Pruning, site: LinearSite, shared: Start, build: Builder, trained: fx.Node) -> fx.Node:
        if spec.variant == "iterative" or not prunes(spec):
            return trained
        part, base = site.own.part, _base(site, build)
        wide, groups = wide_of(base), 1 if spec.allocation == "global" else math.prod(site.leading)

        @cache
        def start() -> list[Edge]:
            if _key(site) in shared.edges:
                return [shared.edges[_key(site)]]
            size = base.numel() // groups
            soft = logit(spec.initial_threshold) if spec.variant == "soft_movement" else -math.inf
            if spec.initial_density == 1 or build.without_values:
                return [(torch.tensor(soft, dtype=wide), torch.tensor(size - 1))] * groups
            kept = kept_of(size, Fraction(str(spec.initial_density)))
            return [edge_of([group], kept)[0] for group in _magnitudes(base).reshape(groups, size)]

        def buffer(name: str, index: int) -> fx.Node:
            return build.buffer(name, lambda device: torch.stack([edge[index] for edge in start()]).to(device))

        scores = build.parameter(f"{part}_scores", tuple(base.shape), zeros, dtype=wide) if spec.scored else None
        threshold, last = buffer(f"{part}_threshold", 0), buffer(f"{part}_last", 1)
        return build.call(torch.ops.graftc.pruned_weight.default, trained, scores, threshold, last, part="pruned")

    def _sparse(self, spec: Pruning, site: LinearSite, shared: Start, build: Builder) -> fx.Node:
        part, base = site.own.part, _base(site, build)
        kept = build.known(tensor_name(site, build.adaptation, f"{part}_indices"))
        if kept is None:
            kept = shared.kept.get(_key(site))
        if kept is None:
            kept = _largest(_magnitudes(base), math.prod(site.leading), spec.remaining(spec.stage - 1))
        numbers: Tensor = kept.to(index_type(base.numel()))
        indices = build.buffer(f"{part}_indices", numbers.to)
        values = build.trained(f"{part}_values", lambda: base.reshape(-1)[numbers.to(base.device)], dtype=base.dtype)
        zero = build.call(aten.new_zeros.default, values, [1] * base.dim(), part="zeros")
        empty = build.call(aten.expand.default, zero, list(base.shape), part="zeros")
        return build.call(torch.ops.graftc.sparse_weight.default, empty, indices, values, part="kept")

    def fold(self, spec: Pruning, site: LinearSite, tensors: Mapping[str, Tensor]) -> Fold:
        """Replace the base's weight with ``W'``, including its zeros."""
        part = site.own.part
        sparse = f"{part}_values" in tensors
        if not sparse and f"{part}_threshold" not in tensors:
            return StandIn()

        def change(stored: Tensor) -> Tensor:
            own = site.own.take(stored)
            if sparse:
                indices, values = tensors[f"{part}_indices"].long(), tensors[f"{part}_values"]
                return site.own.put(stored, own.new_zeros(own.numel()).index_put((indices,), values).view(own.shape))
            scores = tensors.get(f"{part}_scores", own.abs())  # the trained copy is already in place
            gone = dropped(scores, tensors[f"{part}_threshold"], tensors[f"{part}_last"].long())
            return site.own.put(stored, own.masked_fill(gone, 0))

        return TensorFold({part: change})

    def stages(self, spec: Pruning) -> int:
        """Return the number of training runs: ``rounds + 1`` for `iterative`, otherwise one."""
        return spec.rounds + 1 if spec.variant == "iterative" else 1

    def advance(
        self, spec: Pruning, places: Sequence[AdaptedSite[Pruning]], shared: Mapping[str, Tensor]
    ) -> Transition[Pruning]:
        """Run one round of pruning: keep the largest of the remaining entries.

        The next stage trains these entries from their current values, or from the base's if the spec sets ``rewind``.
        """
        assert spec.name is not None and spec.stage < self.stages(spec)
        values: dict[str, Tensor] = {}
        for place, own, kept in _next(spec, places):
            region = own_of(place)
            source = region.take(place.base[region.tensor]).detach() if spec.rewind else own
            name = partial(tensor_name, place.site, spec.name)
            values[name(f"{region.part}_indices")] = kept.to(index_type(own.numel()))
            values[name(f"{region.part}_values")] = source.reshape(-1)[kept]
        return Transition(spec.model_copy(update={"stage": spec.stage + 1}), values, spec.rewind)

    def deployed(self, spec: Pruning, places: Sequence[AdaptedSite[Pruning]]) -> int:
        """Return the number of entries kept at the end of training; for `soft_movement`, the number currently kept."""
        sizes = [size_of(place) for place in places]
        if spec.stage > 1:
            return sum(sizes)
        if spec.variant != "iterative" and spec.allocation == "global":
            return kept_of(sum(sizes), Fraction(str(spec.density)))
        return sum(deployed_of(place, size) for place, size in zip(places, sizes, strict=True))


def _next(
    spec: Pruning, places: Sequence[AdaptedSite[Pruning]]
) -> Iterator[tuple[AdaptedSite[Pruning], Tensor, Tensor]]:
    """Yield each place with its weight and the indices of the entries that remain after a round."""
    remaining = [left_of(place) for place in places]
    scores = [torch.where(left, _magnitudes(own), -1) for own, left in remaining]
    if spec.allocation == "global":
        kept = kept_of(sum(s.numel() for s in scores), spec.remaining(spec.stage))
        edges = edge_of([s.flatten() for s in scores], kept)
        numbers = [_within(s, [edge]) for s, edge in zip(scores, edges, strict=True)]
    else:
        groups = [math.prod(own_of(place).leading) for place in places]
        shares = [place.spec.remaining(spec.stage) for place in places]
        numbers = [_largest(s, n, share) for s, n, share in zip(scores, groups, shares, strict=True)]
    for place, (own, _), kept_numbers in zip(places, remaining, numbers, strict=True):
        yield place, own, kept_numbers


def _is_known(spec: Pruning, sites: Iterable[LinearSite], build: Builder) -> bool:
    """Return whether no joint decision over all sites is needed: it has been made, or all entries are kept."""
    if spec.stage == 1 and spec.initial_density == 1:
        return True
    kind = "last" if spec.stage == 1 else "indices"
    return all(build.known(tensor_name(s, build.adaptation, f"{s.own.part}_{kind}")) is not None for s in sites)


def _magnitudes(weight: Tensor) -> Tensor:
    return weight.abs().to(wide_of(weight))


def _within(scores: Tensor, edges: Sequence[Edge]) -> Tensor:
    """Return the indices of the entries that the edges keep."""
    threshold, last = (torch.stack([edge[i] for edge in edges]) for i in (0, 1))
    return torch.nonzero(~dropped(scores, threshold, last).flatten()).flatten()


def _largest(scores: Tensor, groups: int, share: Fraction) -> Tensor:
    """Return the indices of each group's largest scores; on the meta device, a tensor of that size without values."""
    size = scores.numel() // groups
    kept = kept_of(size, share)
    if scores.is_meta:
        return torch.empty(groups * kept, dtype=torch.int64, device="meta")
    return _within(scores, [edge_of([group], kept)[0] for group in scores.reshape(groups, size)])


def _key(site: LinearSite) -> WeightSlice:
    return site.own.as_stored


def _base(site: LinearSite, build: Builder) -> Tensor:
    """Return the part of the base's weight that the site owns, as stored."""
    return site.own.take(build.store.get(site.own.tensor).detach())
