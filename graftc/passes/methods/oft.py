"""OFT: rotations of blocks of a linear map's input (Qiu et al. 2023, arXiv:2306.07280; 2025, arXiv:2506.19847)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from graftc.passes.core.build.builder import Builder
from graftc.passes.core.method.lowrank import zeros
from graftc.passes.core.method.steering import Controller
from graftc.passes.core.sites.sites import LinearSite
from graftc.passes.methods.bases.rotation import RotationMethod, cayley
from graftc.specs.methods.oft import OFT

ops = torch.ops.graftc


class Projection(Controller[OFT]):
    """Controller that scales blocks of ``Q`` down to the bound of constrained OFT after each optimiser step."""

    @classmethod
    def wanted(cls, spec: OFT) -> bool:
        """Return whether the spec is constrained."""
        return spec.coft

    def step(self, number: int) -> None:
        """Scale down the blocks of all places whose norm exceeds the bound."""
        for place in self.places:
            place.tensors["Q"].copy_(projected(place.tensors["Q"], self.spec.eps))


class OFTMethod(RotationMethod[OFT]):
    """``y = W (x R) + b``, where ``Q`` has the entries above the diagonal of skew-symmetric matrices."""

    controller = Projection

    def insert(self, spec: OFT, site: LinearSite, shared: Any, build: Builder) -> None:
        """Rotate the site's input, or add the change of the weight.

        Raises:
            GraftError: GC020 if the blocks do not divide the input evenly, and GC017 where the change of the weight is
                added if an adaptation at the site cannot be expressed as a change to the weights.
        """
        blocks, size = self.blocks(spec, site)
        shape = (*site.leading, 1 if spec.block_share else blocks, size * (size - 1) // 2)
        wide = torch.promote_types(site.dtype, torch.float32)
        self.rotate(spec, site, build, build.parameter("Q", shape, zeros, dtype=wide))

    def nearest(self, spec: OFT) -> bool:
        """Return ``nearest`` of the spec."""
        return spec.nearest

    def turns(self, spec: OFT, q: Tensor, size: int) -> list[Tensor]:
        """Return ``T``; its gradient ignores the projection, which PEFT applies to the tensor itself."""
        if spec.coft:
            q = q + (projected(q, spec.eps) - q).detach()
        skew: Tensor = ops.skew(q, size)
        if spec.cayley == "exact":
            return [cayley(skew)]
        total, power = 2 * skew, skew
        if spec.terms == 2:
            return [total]
        for _ in range(3, max(spec.terms, 4)):
            power = power @ skew
            total = total + 2 * power
        return [total + power @ skew]


def projected(q: Tensor, eps: float) -> Tensor:
    """Return the blocks, scaled down to a norm of ``eps / sqrt(blocks)`` if theirs is larger.

    The norm is that of the whole matrix, of which ``q`` has half of the entries.
    """
    bound = eps / q.shape[-2] ** 0.5
    norm = q.square().sum(-1, keepdim=True).mul(2).sqrt()
    return torch.where(norm <= bound, q, q * (bound / norm))
