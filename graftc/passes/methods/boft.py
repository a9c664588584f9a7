"""BOFT: rotations in the form of a butterfly, and a scale for each output (Liu et al. 2024, arXiv:2311.06243)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from graftc.passes.core.build.builder import Builder
from graftc.passes.core.method.lowrank import ones, zeros
from graftc.passes.core.sites.sites import LinearSite
from graftc.passes.methods.bases.rotation import RotationMethod, cayley, unfit
from graftc.specs.methods.boft import BOFT


class BOFTMethod(RotationMethod[BOFT]):
    """``y = s * (W (x R)) + b`` with ``R = ... R_1 R_0``."""

    def insert(self, spec: BOFT, site: LinearSite, shared: Any, build: Builder) -> None:
        """Rotate the site's input and scale its output, or add the change of the weight.

        Raises:
            GraftError: GC020 if the blocks of a factor do not divide the input evenly, GC017 if an adaptation at the
                site cannot be expressed as a change to the weights.
        """
        blocks, size = self.blocks(spec, site)
        wide = torch.promote_types(site.dtype, torch.float32)
        q = build.parameter("Q", (*site.leading, spec.factors, blocks, size, size), zeros, dtype=wide)
        scale = build.parameter("s", (*site.leading, site.out_features), ones, dtype=wide)
        self.rotate(spec, site, build, q, scale)

    def blocks(self, spec: BOFT, site: LinearSite) -> tuple[int, int]:
        """Return the number of blocks of every factor at a site, and their size.

        Raises:
            GraftError: GC020 if they do not divide the input, or if a factor cannot combine blocks in pairs.
        """
        blocks, size = super().blocks(spec, site)
        if spec.factors > 1 and (size % 2 or blocks % 2 ** (spec.factors - 1)):
            needed = f"an even block_size, and a multiple of {2 ** (spec.factors - 1)} as the number of blocks"
            raise unfit(spec, site, f"{spec.factors} factors need {needed}; use fewer factors")
        return blocks, size

    def turns(self, spec: BOFT, q: Tensor, size: int) -> list[Tensor]:
        """Return ``T`` of every factor, from the skew-symmetric part of ``Q``."""
        turns = cayley((q - q.mT) / 2)
        return [turns.select(-4, number) for number in range(spec.factors)]
