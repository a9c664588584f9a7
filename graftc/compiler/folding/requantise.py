"""Pack folded weights again, and measure how much of the fold is lost.

A fold on a quantised base is exact in the weights' dtype. Packing it again rounds each value to the nearest one that
the packing can represent, and the spacing of these values is often much coarser than an update. This module measures
how much of the update is left, and how far the packed weights are from the folded ones.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from graftc.compiler.folding.certify import Folded
from graftc.compiler.folding.rounding import retained
from graftc.passes.core.packing.packing import PackedType
from graftc.passes.core.weights.folds import FoldStep, LazyTensors
from graftc.passes.core.weights.store import Store
from graftc.passes.core.weights.weight_slice import WeightSlice
from graftc.records.certificate import PackingEvidence
from graftc.records.retention import Retention
from graftc.specs.errors.diagnostics import GraftError

BaseForm: TypeAlias = Literal["full", "requantized"]
"""The form in which a merge stores weights that were packed: see `Compiled.merge`."""

REQUANTISED_BUDGET: Mapping[str, float] = {"int8": 0.05}
"""How much outputs may differ after packing again, by packing, relative to the largest output (or to 1 if larger)."""

REQUANTISED_MOST = 0.5
"""How much outputs may differ after packing again with any other packing, all of which have 4 bits."""


@dataclass(frozen=True)
class Repacked:
    """The result of packing folded weights again.

    Attributes:
        packed: the packed parts of the weights that changed, by weight name; all other weights keep theirs.
        evidence: the evidence, one entry per site.
        budget: the default budget for outputs, relative to the largest output; 0 if nothing was packed again.
    """

    packed: Mapping[str, tuple[Tensor, ...]] = field(default_factory=dict)
    evidence: tuple[PackingEvidence, ...] = ()
    budget: float = 0.0


def requantised(store: Store, lazy: LazyTensors, folds: Folded) -> tuple[Folded, Repacked]:
    """Pack the folded weights that were packed before, each in its own packing.

    Args:
        store: the base's Store.
        lazy: the lazy tensors, which define the rows that belong to each site.
        folds: the fold; a packed weight is packed again from its rounded values.

    Returns:
        The fold without these weights, with the retention after packing, and the packed weights.

    Raises:
        GraftError: GC166 for a packing that can only be read.
    """
    tensors, packed = dict(folds.tensors), dict[str, tuple[Tensor, ...]]()
    evidence: list[PackingEvidence] = []
    total, of_sites, budget = Retention(), dict[str, Retention](), 0.0
    for name, folded in folds.tensors.items():
        parts = _parts(name, lazy.chain(name))
        base = store.full(name) if name in store else torch.zeros_like(folded)
        now = folded
        if name in store.packed:
            own, same = store.packed[name], folded == base
            if bool(same.all()):
                now = base
            else:
                packed[name] = _packed(store, name, own, folded, same)
                budget = max(budget, REQUANTISED_BUDGET.get(own.packing.kind, REQUANTISED_MOST))
                now = own.value(packed[name])
            del tensors[name]
            evidence += _at_sites(name, own, parts, (base, folded, now))
        left = retained(base, folded, now)
        total += left
        for site, part in parts:
            mine = left if part.whole else retained(*(part.take(each) for each in (base, folded, now)))
            of_sites[site] = of_sites.get(site, Retention()) + mine
    sites = tuple(replace(s, retention=of_sites.get(s.site, s.retention)) for s in folds.sites)
    return replace(folds, tensors=tensors, sites=sites, retention=total), Repacked(packed, tuple(evidence), budget)


def _packed(store: Store, name: str, own: PackedType, folded: Tensor, same: Tensor) -> tuple[Tensor, ...]:
    try:
        return own.packing.repacked(folded, [store.full(part) for part in own.names(name)], same)
    except NotImplementedError as error:
        message = f"{name} is packed as {own.packing.kind!r}, which graftc can read but not write"
        raise GraftError("GC166", message, hint='merge with base="full" (--base full)') from error


def _parts(name: str, steps: Iterable[FoldStep]) -> list[tuple[str, WeightSlice]]:
    """Return each site's own rows of a weight, with each site once."""
    slices = {step.site: part for step in steps for part in step.parts if part.tensor == name}
    return list(slices.items())


def _at_sites(
    name: str, own: PackedType, parts: Sequence[tuple[str, WeightSlice]], values: tuple[Tensor, Tensor, Tensor]
) -> list[PackingEvidence]:
    _, folded, now = values
    turned = own.packing.transposed
    base, after, packed = (each.transpose(-1, -2) if turned else each for each in values)
    untouched = (after == base).all(-1)
    disturbed = untouched & (packed != base).any(-1)
    rows, lost = int(untouched.sum()), int(disturbed.sum())
    evidence = []
    for site, part in parts:
        mine, theirs = (part.take(each).double() for each in (folded, now))
        error = mine - theirs
        evidence.append(
            PackingEvidence(
                site,
                name,
                own.packing.text,
                _ratio(float(torch.linalg.vector_norm(error)), float(torch.linalg.vector_norm(mine))),
                _ratio(float(error.abs().max()), float(mine.abs().max())),
                rows,
                lost,
            )
        )
    return evidence


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else (0.0 if not part else math.inf)
