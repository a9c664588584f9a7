"""The part of pruning that runs between optimiser steps, and helpers for the entries that remain at each place."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction

import torch
from torch import Tensor

from graftc.passes.core.method.steering import AdaptedSite, TensorObjective, unknown_length
from graftc.passes.core.ops.pruned import Edge, dropped, edge_of
from graftc.passes.core.sites.sites import LinearSite
from graftc.passes.core.weights.weight_slice import WeightSlice
from graftc.passes.methods.bases.scheduled import ScheduledController, check_phases
from graftc.specs.methods.pruning import Pruning, kept_of

PENALTY = "penalty"
"""Part name of the penalty's current weight."""


class PruningMasks(ScheduledController[Pruning]):
    """Controller that determines after each step, from the current scores, which entries are kept."""

    @classmethod
    def wanted(cls, spec: Pruning) -> bool:
        """Return whether the adaptation, or one of its sites, is pruned between steps."""
        return spec.variant != "iterative" and (prunes(spec) or any(o.density for o in spec.overrides))

    def check_length(self, total: int) -> None:
        """Check that the phases leave at least one step for pruning.

        Raises:
            GraftError: GC026 if they do not.
        """
        if self.moves:
            check_phases(self.spec, total)

    @property
    def moves(self) -> bool:
        """Whether the density, the threshold or the penalty changes during training."""
        specs = [self.spec, *(place.spec for place in self.places)]
        if self.spec.variant == "soft_movement":
            return bool(self.spec.penalty) or any(s.initial_threshold != s.threshold for s in specs)
        return any(s.initial_density != s.density for s in specs)

    def fallen(self, number: int) -> Fraction:
        """Return the completed fraction of the schedule after step ``number`` (from 1): ``1 - (1 - progress)^3``.

        Raises:
            GraftError: GC026 if the number of steps is not known.
        """
        if not self.moves:
            return Fraction(1)
        if self.total is None:
            raise unknown_length(f"the density of {self.spec.name!r}")
        start, end = self.spec.warmup_steps, self.total - self.spec.final_steps
        progress = min(max(Fraction(number - start, end - start), Fraction(0)), Fraction(1))
        return 1 - (1 - progress) ** 3

    def density(self, number: int, spec: Pruning | None = None) -> Fraction:
        """Return the share of entries kept after step ``number`` (from 1) for the adaptation or a site's ``spec``."""
        spec = spec or self.spec
        first, last = (Fraction(str(value)) for value in (spec.initial_density, spec.density))
        return first + (last - first) * self.fallen(number)

    def figures(self, place: AdaptedSite[Pruning]) -> Mapping[str, Tensor | float]:
        """Return ``density``: the share of a weight's entries currently kept; empty if the weight is not pruned."""
        return {} if part_of(place) is None else {"density": kept_entries(place).float().mean()}

    def threshold(self, number: int, spec: Pruning | None = None) -> float:
        """Return the value that sigmoids must exceed after step ``number``, counted from 1."""
        spec = spec or self.spec
        first, last = (Fraction(str(value)) for value in (spec.initial_threshold, spec.threshold))
        return float(first + (last - first) * self.fallen(number))

    def step(self, number: int) -> None:
        """Update which entries are kept, and the weight of the penalty.

        Raises:
            GraftError: GC026 if the number of steps is not known.
        """
        pruned = [place for place in self.places if part_of(place) is not None]
        if self.spec.allocation == "global":
            groups = [group for place in pruned for group in _groups(place)]
            edges = iter(edge_of(groups, kept_of(sum(g.numel() for g in groups), self.density(number))))
            for place in pruned:
                _set(place, [next(edges)])
            return
        for place in pruned:
            if place.spec.variant == "soft_movement":
                _set(place, [self._soft(number, place.spec, group) for group in _groups(place)])
            else:
                share = self.density(number, place.spec)
                _set(place, [edge_of([g], kept_of(g.numel(), share))[0] for g in _groups(place)])
        if PENALTY in self.shared:
            self.shared[PENALTY].fill_(self.spec.penalty * float(self.fallen(number)))

    def _soft(self, number: int, spec: Pruning, scores: Tensor) -> Edge:
        """Return the edge at the threshold or, if too few entries exceed it, the edge that keeps the minimum number."""
        least, last = edge_of([scores], kept_of(scores.numel(), Fraction(str(spec.least_density))))[0]
        soft = scores.new_tensor(logit(self.threshold(number, spec)))
        enough = least > soft
        return torch.where(enough, soft, least), torch.where(enough, -1, last)


class Penalty(TensorObjective[Pruning]):
    """The current penalty times the mean of ``sigmoid(S)``, averaged first within each tensor, then over tensors."""

    @classmethod
    def wanted(cls, spec: Pruning) -> bool:
        """Return whether the variant is `soft_movement` and its penalty is above zero."""
        return spec.variant == "soft_movement" and spec.penalty > 0

    def value(self) -> Tensor:
        """Return the current penalty times the mean sigmoid of the scores."""
        means = [place.tensors[f"{part_of(place)}_scores"].sigmoid().mean() for place in self.places]
        return (self.shared[PENALTY] * torch.stack(means).mean()).squeeze()


def own_of(place: AdaptedSite[Pruning]) -> WeightSlice:
    """Return the rows of the weight at a place."""
    assert isinstance(place.site, LinearSite)
    return place.site.own


def part_of(place: AdaptedSite[Pruning]) -> str | None:
    """Return the name of a place's weight within its module; None if it is not pruned between steps."""
    part = own_of(place).part
    return part if f"{part}_threshold" in place.tensors else None


def kept_entries(place: AdaptedSite[Pruning]) -> Tensor:
    """Return a mask of the entries of a place that are currently kept, ``bool`` in the shape of its stored weight."""
    part = part_of(place)
    if part is None:
        return left_of(place)[1]
    scores = place.tensors.get(f"{part}_scores", place.tensors[part].abs()).detach()
    return ~dropped(scores, place.tensors[f"{part}_threshold"], place.tensors[f"{part}_last"])


def deployed_of(place: AdaptedSite[Pruning], size: int) -> int:
    """Return the number of entries that a place is deployed with, out of ``size``."""
    if part_of(place) is None:
        return size
    groups = place.tensors[f"{part_of(place)}_threshold"].numel()
    if place.spec.variant != "soft_movement":
        return groups * kept_of(size // groups, Fraction(str(place.spec.density)))
    kept = kept_entries(place)
    return size if kept.is_meta else int(kept.sum())


def left_of(place: AdaptedSite[Pruning]) -> tuple[Tensor, Tensor]:
    """Return the weight of a place and a mask of its remaining entries, both in the shape of the stored weight."""
    part, shape = own_of(place).part, own_of(place).own_shape
    if part in place.tensors:
        own = place.tensors[part].detach()
        return own, torch.ones_like(own, dtype=torch.bool)
    values, indices = place.tensors[f"{part}_values"].detach(), place.tensors[f"{part}_indices"].long()
    own, left = values.new_zeros(shape), torch.zeros(shape, dtype=torch.bool, device=values.device)
    own.view(-1)[indices], left.view(-1)[indices] = values, True
    return own, left


def size_of(place: AdaptedSite[Pruning]) -> int:
    """Return the number of trained entries of a place."""
    part = own_of(place).part
    return place.tensors[part if part in place.tensors else f"{part}_values"].numel()


def _groups(place: AdaptedSite[Pruning]) -> list[Tensor]:
    """Return the scores of each matrix of a place that has its own threshold."""
    part = part_of(place)
    trained = place.tensors.get(f"{part}_scores")
    edge = place.tensors[f"{part}_threshold"]
    scores = place.tensors[f"{part}"].abs().to(edge.dtype) if trained is None else trained
    return list(scores.detach().reshape(edge.numel(), -1))


def _set(place: AdaptedSite[Pruning], edges: Sequence[Edge]) -> None:
    part = part_of(place)
    for index, name in enumerate(("threshold", "last")):
        place.tensors[f"{part}_{name}"].copy_(torch.stack([edge[index] for edge in edges]))


def prunes(spec: Pruning) -> bool:
    """Return whether an adaptation, or one of its sites, is pruned between the steps of a training run."""
    return spec.variant == "soft_movement" or spec.density < 1


def logit(p: float) -> float:
    """Return the score whose sigmoid is ``p``; minus infinity for 0."""
    return math.log(p / (1 - p)) if p else -math.inf


def wide_of(tensor: Tensor) -> torch.dtype:
    """Return the dtype of a weight's scores: float32 or wider."""
    return torch.promote_types(tensor.dtype, torch.float32)
