"""SoRA: a low-rank update with a gate for every rank; a proximal operator closes gates (Ding et al. 2023)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from graftc.passes.core.build.builder import Builder
from graftc.passes.core.method.capabilities import Ranked
from graftc.passes.core.method.lowrank import factors, gated, normal, uniform, zeros
from graftc.passes.core.method.steering import Controller, TensorObjective, wide
from graftc.passes.core.sites.sites import LinearSite
from graftc.passes.methods.bases.low_rank import LowRankMethod, add_branch
from graftc.specs.errors.diagnostics import GraftError
from graftc.specs.methods.sora import SoRA


def shrink(gate: Tensor, threshold: float, *, zero_below: float) -> Tensor:
    """Return ``gate`` with magnitudes reduced by ``threshold``, but not below 0; those below ``zero_below`` become 0.

    With ``zero_below == threshold``, this is the proximal operator of ``threshold * |g|``.
    """
    size = gate.abs()
    return gate.sign() * torch.where(size < zero_below, 0, (size - threshold).clamp_min(0))


class Prox(Controller[SoRA]):
    """Controller that shrinks gates after each optimiser step and closes small ones."""

    @classmethod
    def wanted(cls, spec: SoRA) -> bool:
        """Return whether the threshold is above zero at the start or at the end."""
        return spec.threshold > 0 or bool(spec.final_threshold)

    def threshold(self, number: int) -> float:
        """Return the threshold after step ``number``, counted from 1.

        Raises:
            GraftError: GC026 if the threshold depends on the number of steps, but that number is not known.
        """
        first, last = self.spec.threshold, self.spec.final_threshold
        if last is None:
            return first
        if self.total is None:
            hint = "call compiled.begin(total_steps) before training"
            raise GraftError("GC026", f"the threshold of {self.spec.name!r} depends on the number of steps", hint=hint)
        return first + (last - first) * min(1.0, number / self.total)

    def step(self, number: int) -> None:
        """Shrink the gates of all places by the threshold of this step.

        Raises:
            GraftError: GC026 under the same condition as `threshold`.
        """
        threshold = self.threshold(number)
        zero_below = 2 * threshold if self.spec.prox == "reference" else threshold
        for place in self.places:
            gate = place.tensors["gate"]
            gate.copy_(shrink(gate, threshold, zero_below=zero_below))


class Sparsity(TensorObjective[SoRA]):
    """``l1`` times the mean absolute gate over all sites."""

    @classmethod
    def wanted(cls, spec: SoRA) -> bool:
        """Return whether ``l1`` is above zero."""
        return spec.l1 > 0

    def value(self) -> Tensor:
        """Return ``l1`` times the mean absolute gate over all sites."""
        return self.spec.l1 * torch.cat([wide(place.tensors["gate"]).flatten() for place in self.places]).abs().mean()


class SoRAMethod(LowRankMethod[SoRA], Ranked[SoRA]):
    """``y = W x + b + s B (g * (A drop(x)))`` with ``A: [rank, in]``, ``g: [rank]`` and ``B: [out, rank]``.

    ``s`` is ``alpha / rank``. ``g`` multiplies the smaller factor. Each expert has its own gates.
    """

    controller = Prox
    objective = Sparsity

    def insert(self, spec: SoRA, site: LinearSite, shared: Any, build: Builder) -> None:
        """Insert the branch.

        Raises:
            GraftError: GC020 when the rank exceeds ``min(in, out)``.
        """
        a, b = factors(build, site, spec.rank, uniform, zeros)
        gate = build.parameter("gate", (*site.leading, spec.rank), normal(1), dtype=site.dtype)
        add_branch(spec, site, build, *gated(build, site, a, b, gate), spec.scaling)

    def update(self, spec: SoRA, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, float]:
        """Return ``B diag(g)``, ``A`` and the scale."""
        return tensors["B"] * tensors["gate"][..., None, :], tensors["A"], spec.scaling

    def live_ranks(self, spec: SoRA, tensors: Mapping[str, Tensor]) -> Tensor:
        """Return a mask of the ranks whose gate is not zero."""
        return tensors["gate"].detach() != 0
