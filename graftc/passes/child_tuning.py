"""Child-Tuning: every step trains another random part of the network (Xu et al. 2021)."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from graftc.passes.core.builder import Builder
from graftc.passes.core.ops import SEEDS
from graftc.passes.core.sites import Site
from graftc.passes.core.steering import STEP, Controller
from graftc.passes.full import TrainedTensors
from graftc.specs.child_tuning import ChildTuning


class Steps(Controller[ChildTuning]):
    """Counts steps, which is all that masks need to be drawn anew."""

    @classmethod
    def wanted(cls, spec: ChildTuning) -> bool:
        """See `Steering.wanted`."""
        return spec.reserve_p < 1

    def step(self, number: int) -> None:
        """See `Controller.step`."""


class ChildTuningMethod(TrainedTensors[ChildTuning]):
    """`TrainedTensors` whose gradients are masked: ``mask / p * gradient`` with another mask in every step."""

    spec_class = ChildTuning
    controller = Steps

    def prepare(self, spec: ChildTuning, sites: Sequence[Site], build: Builder) -> fx.Node | None:
        """The count of steps; None where nothing is masked."""
        return build.buffer(STEP, _first_step) if Steps.wanted(spec) else None

    def read(self, spec: ChildTuning, shared: Any, build: Builder, trained: fx.Node) -> fx.Node:
        """See `TrainedTensors.read`: a view that masks the gradient."""
        if shared is None:
            return trained
        name = str(trained.target)
        part = name.rpartition(".")[2]
        # A tensor, not a literal: layers that are alike keep code that is alike, and a checkpoint has it.
        seed = build.buffer(f"{part}_seed", lambda device: torch.tensor([_seed(build.seed, name)], device=device))
        return build.call(torch.ops.graftc.grad_mask.default, trained, shared, seed, spec.reserve_p, part="mask")


def _first_step(device: torch.device) -> Tensor:
    return torch.zeros(1, dtype=torch.int64, device=device)


def _seed(seed: int, name: str) -> int:
    """What masks of a tensor are drawn from."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8], "big") % SEEDS
