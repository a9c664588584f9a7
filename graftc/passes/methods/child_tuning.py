"""Child-Tuning: a part of the network trains, another in every step or one for good (Xu et al. 2021)."""

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
from graftc.passes.core.ops.decompositions import SEEDS
from graftc.passes.core.weights.folds import Fold
from graftc.passes.methods.full import Stored, TrainedTensors
from graftc.passes.methods.selection import ScoredTensors
from graftc.specs.methods.child_tuning import ChildTuning


class Steps(Controller[ChildTuning]):
    """Counts steps, which is all that masks need to be drawn anew."""

    @classmethod
    def wanted(cls, spec: ChildTuning) -> bool:
        """See `Steering.wanted`."""
        return spec.variant == "F" and spec.reserve_p < 1

    def step(self, number: int) -> None:
        """See `Controller.step`."""


class ChildTuningMethod(TrainedTensors[ChildTuning], Scored[ChildTuning]):
    """`TrainedTensors` with masked gradients: ``mask / p * gradient`` with a different mask in every step.

    Variant `D` uses `SparseTensors` in the layers and trained copies elsewhere.
    """

    controller = Steps

    def __init__(self) -> None:
        self._layers = _Layers()

    def prepare(self, spec: ChildTuning, sites: Sequence[Stored], build: Builder) -> Any:
        """The count of steps, None where nothing is masked; what is selected of the layers.

        Raises:
            GraftError: GC020 where that is nothing.
        """
        if spec.variant == "D":
            return self._layers.prepare(spec, [site for site in sites if site.layer is not None], build)
        return build.buffer(STEP, no_steps) if Steps.wanted(spec) else None

    def insert(self, spec: ChildTuning, site: Stored, shared: Any, build: Builder) -> None:
        """See `TrainedTensors.insert`, and `SparseTensors.insert` for the layers of the other variant."""
        if spec.variant == "D" and site.layer is not None:
            self._layers.insert(spec, site, shared, build)
        else:
            super().insert(spec, site, shared, build)

    def fold(self, spec: ChildTuning, site: Stored, tensors: Mapping[str, Tensor]) -> Fold:
        """The trained values, and the sums, are the new ones."""
        sparse = spec.variant == "D" and site.layer is not None
        return self._layers.fold(spec, site, tensors) if sparse else super().fold(spec, site, tensors)

    def scoring(self, spec: ChildTuning) -> Scoring | None:
        """Squares of the gradients of whole batches, each clipped tensor by tensor: the authors' code."""
        return self._layers.scoring(spec) if spec.variant == "D" else None

    def scored(self, places: Sequence[AdaptedSite[ChildTuning]]) -> Sequence[str]:
        """See `Scored.scored`."""
        return self._layers.scored(_in_layers(places))

    def selected(
        self, spec: ChildTuning, places: Sequence[AdaptedSite[ChildTuning]], scores: Mapping[str, Tensor]
    ) -> Transition[ChildTuning]:
        """See `Scored.selected`."""
        return self._layers.selected(spec, _in_layers(places), scores)

    def read(self, spec: ChildTuning, shared: Any, build: Builder, trained: fx.Node) -> fx.Node:
        """See `TrainedTensors.read`: a view that masks the gradient."""
        if not Steps.wanted(spec):
            return trained
        name = str(trained.target)
        part = name.rpartition(".")[2]
        # A tensor, not a literal: layers that are alike keep code that is alike, and a checkpoint has it.
        seed = build.buffer(f"{part}_seed", lambda device: torch.tensor([_seed(build.seed, name)], device=device))
        return build.call(torch.ops.graftc.grad_mask.default, trained, shared, seed, spec.reserve_p, part="mask")


class _Layers(ScoredTensors[ChildTuning]):
    """The layers of the variant that is chosen once."""

    def scoring(self, spec: ChildTuning) -> Scoring | None:
        """See `ChildTuningMethod.scoring`."""
        return Fisher(single=False, clip=spec.clip)


def _in_layers(places: Sequence[AdaptedSite[ChildTuning]]) -> list[AdaptedSite[ChildTuning]]:
    return [place for place in places if place.site.layer is not None]


def _seed(seed: int, name: str) -> int:
    """What masks of a tensor are drawn from."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8], "big") % SEEDS
