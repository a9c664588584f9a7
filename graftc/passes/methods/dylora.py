"""DyLoRA: one low-rank update that works at every rank up to its own (Valipour et al. 2023, arXiv:2210.07558)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from graftc.passes.core.build.builder import Builder
from graftc.passes.core.method.capabilities import Ranked
from graftc.passes.core.method.lowrank import factors, gated, uniform, zeros
from graftc.passes.core.sites.sites import LinearSite
from graftc.passes.methods.bases.low_rank import LowRankMethod, add_branch
from graftc.specs.errors.diagnostics import GraftError
from graftc.specs.methods.dylora import DyLoRA

aten = torch.ops.aten
DEPLOYED = "deployed"
"""Part name of the rank used in eval mode, ``int64[1]``."""


@dataclass(frozen=True)
class Drawn:
    """The rank drawn for a forward pass, in the forms that sites use.

    Attributes:
        last: ``bool[rank]``, true only at the last of the first ``r`` ranks.
        gates: ``alpha / r`` for the first ``r`` ranks and zero for the others, ``[rank]``, by dtype.
    """

    last: fx.Node
    gates: Mapping[torch.dtype, fx.Node]


class DyLoRAMethod(LowRankMethod[DyLoRA], Ranked[DyLoRA]):
    """``y = W x + b + (alpha / r) B[:, :r] A[:r] drop(x)`` with ``A: [rank, in]`` and ``B: [out, rank]``.

    All sites use the same ``r`` in a pass; it is drawn outside the layers, so a layer that is recomputed in the
    backward pass uses the same ``r``. Ranks above ``r`` are multiplied by zero, so shapes do not depend on the draw.
    """

    def prepare(self, spec: DyLoRA, sites: Sequence[LinearSite], build: Builder) -> Drawn:
        """Draw the rank, once for all sites."""
        deployed = build.buffer(DEPLOYED, lambda device: torch.full((1,), spec.rank, dtype=torch.int64, device=device))
        drawn = build.drawn(deployed, 1, spec.rank + 1, part="rank")
        ones = build.call(aten.new_ones.default, drawn, [spec.rank], part="one")
        number = build.call(aten.cumsum.default, ones, 0, part="number")
        used = build.call(aten.le.Tensor, number, drawn, part="used")
        gates: dict[torch.dtype, fx.Node] = {}
        for dtype in dict.fromkeys(site.dtype for site in sites):
            own = build.call(aten.to.dtype, used, dtype, part="used")
            scaled = build.call(aten.mul.Tensor, own, spec.alpha, part="alpha")
            gates[dtype] = build.call(aten.div.Tensor, scaled, drawn, part="gate")
        return Drawn(build.call(aten.eq.Tensor, number, drawn, part="last"), gates)

    def insert(self, spec: DyLoRA, site: LinearSite, shared: Drawn, build: Builder) -> None:
        """Insert the branch.

        Raises:
            GraftError: GC020 when the rank exceeds ``min(in, out)``.
        """
        a, b = factors(build, site, spec.rank, uniform, zeros)
        if spec.frozen:
            a = _only_last(build, a, build.call(aten.unsqueeze.default, shared.last, -1, part="last"))
            b = _only_last(build, b, shared.last)
        add_branch(spec, site, build, *gated(build, site, a, b, shared.gates[site.dtype]))

    def update(self, spec: DyLoRA, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, float]:
        """Return the factors of the deployed rank, ``B[:, :r]`` and ``A[:r]``, and ``alpha / r``."""
        rank = int(tensors[DEPLOYED])
        return tensors["B"][..., :rank], tensors["A"][..., :rank, :], spec.alpha / rank

    def live_ranks(self, spec: DyLoRA, tensors: Mapping[str, Tensor]) -> Tensor:
        """Return a mask of the deployed ranks, which come first."""
        a = tensors["A"]
        return torch.arange(spec.rank, device=a.device).expand(a.shape[:-1]) < tensors[DEPLOYED]

    def deploy_rank(self, spec: DyLoRA, shared: Mapping[str, Tensor], rank: int) -> None:
        """Set the deployed rank, which must be at least 1 and at most the spec's rank."""
        if type(rank) is not int or not 1 <= rank <= spec.rank:
            message = f"the rank of {spec.name!r} must be an integer from 1 to {spec.rank}, got {rank!r}"
            raise GraftError("GC055", message, hint=f"use a rank of at most {spec.rank}")
        shared[DEPLOYED].fill_(rank)


def _only_last(build: Builder, factor: fx.Node, last: fx.Node) -> fx.Node:
    """Return ``factor`` with unchanged values, but gradients only for the ranks in ``last``."""
    fixed = build.call(aten.detach.default, factor, part="fixed")
    return build.call(aten.where.self, last, factor, fixed, part="frozen")
