"""Child-Tuning: training a part of the network that is redrawn at every step or chosen once (Xu et al. 2021)."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from graftc.passes.core.build.builder import Builder
from graftc.passes.core.method.capabilities import Scored, Transition
from graftc.passes.core.method.scoring import Fisher, Scoring
from graftc.passes.core.method.steering import STEP, AdaptedSite, Controller, no_steps
from graftc.passes.core.ops.hashing import SEEDS
from graftc.passes.core.weights.folds import Fold
from graftc.passes.methods.bases.sparse import ScoredTensors
from graftc.passes.methods.full import Stored, TrainedTensors
from graftc.specs.methods.child_tuning import ChildTuning


class Steps(Controller[ChildTuning]):
    """Controller that only counts steps; the masks of a step are derived from the count."""

    @classmethod
    def wanted(cls, spec: ChildTuning) -> bool:
        """Return whether gradients are masked: only in variant `F`, and only if ``reserve_p`` is below 1."""
        return spec.variant == "F" and spec.reserve_p < 1

    def step(self, number: int) -> None:
        """Do nothing; the step has already been counted."""


class ChildTuningMethod(TrainedTensors[ChildTuning], Scored[ChildTuning]):
    """`TrainedTensors` with masked gradients: ``mask / p * gradient`` with a different mask at every step.

    Variant `D` uses `SparseTensors` in the layers and trained copies elsewhere.
    """

    controller = Steps

    def __init__(self) -> None:
        self._layers = _Layers()

    def prepare(self, spec: ChildTuning, sites: Sequence[Stored], build: Builder) -> Any:
        """Return the step counter, or None if nothing is masked; for variant `D`, the entries selected in the layers.

        Raises:
            GraftError: GC020 if variant `D` selects no entries.
        """
        if spec.variant == "D":
            return self._layers.prepare(spec, [site for site in sites if site.layer is not None], build)
        return build.buffer(STEP, no_steps) if Steps.wanted(spec) else None

    def insert(self, spec: ChildTuning, site: Stored, shared: Any, build: Builder) -> None:
        """Insert trained copies; for variant `D`, train only the selected entries in the layers."""
        if spec.variant == "D" and site.layer is not None:
            self._layers.insert(spec, site, shared, build)
        else:
            super().insert(spec, site, shared, build)

    def fold(self, spec: ChildTuning, site: Stored, tensors: Mapping[str, Tensor]) -> Fold:
        """Replace the base's tensors with trained copies; for variant `D`, fold the sums into the layers' tensors."""
        sparse = spec.variant == "D" and site.layer is not None
        return self._layers.fold(spec, site, tensors) if sparse else super().fold(spec, site, tensors)

    def scoring(self, spec: ChildTuning) -> Scoring | None:
        """Return the scoring of variant `D`, as in the authors' code.

        Scores are squared gradients of whole batches, clipped tensor by tensor.
        """
        return self._layers.scoring(spec) if spec.variant == "D" else None

    def scored(self, places: Sequence[AdaptedSite[ChildTuning]]) -> Sequence[str]:
        """Return the names of the base's tensors in the layers."""
        return self._layers.scored(_in_layers(places))

    def selected(
        self, spec: ChildTuning, places: Sequence[AdaptedSite[ChildTuning]], scores: Mapping[str, Tensor]
    ) -> Transition[ChildTuning]:
        """Select the entries with the greatest scores in the layers."""
        return self._layers.selected(spec, _in_layers(places), scores)

    def read(self, spec: ChildTuning, shared: Any, build: Builder, trained: fx.Node) -> fx.Node:
        """Return a view of the trained tensor that masks its gradient, or the tensor itself if nothing is masked."""
        if not Steps.wanted(spec):
            return trained
        name = str(trained.target)
        part = name.rpartition(".")[2]
        # A tensor rather than a literal, so that identical layers share code and checkpoints contain the seed.
        seed = build.buffer(f"{part}_seed", lambda device: torch.tensor([_seed(build.seed, name)], device=device))
        return build.call(torch.ops.graftc.grad_mask.default, trained, shared, seed, spec.reserve_p, part="mask")


class _Layers(ScoredTensors[ChildTuning]):
    """Trains the selected entries in the layers, for variant `D`."""

    def scoring(self, spec: ChildTuning) -> Scoring | None:
        """Return the scoring by squared gradients of whole batches, clipped per tensor."""
        return Fisher(single=False, clip=spec.clip)


def _in_layers(places: Sequence[AdaptedSite[ChildTuning]]) -> list[AdaptedSite[ChildTuning]]:
    return [place for place in places if place.site.layer is not None]


def _seed(seed: int, name: str) -> int:
    """Return the seed of a tensor's masks, derived from the build's seed and the tensor's name."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8], "big") % SEEDS
