"""AdaMix for low-rank updates, whose factors have experts (Wang et al. 2022, arXiv:2205.12410)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from graftc.passes.core.build.builder import Builder, Initialiser
from graftc.passes.core.build.random_experts import pick, route
from graftc.passes.core.method.capabilities import Collapsing, Observed, Reading
from graftc.passes.core.method.lowrank import added, check_rank, uniform, zeros
from graftc.passes.core.method.method import Method
from graftc.passes.core.sites.sites import LinearSite
from graftc.passes.core.weights.folds import Fold, weight_fold
from graftc.passes.methods.adamix import Agreement, mean, route_of
from graftc.passes.methods.bases.low_rank import add_branch
from graftc.specs.base import MethodSpec
from graftc.specs.methods.adamix_lora import AdaMixLoRA
from graftc.specs.methods.lora import LoRA

_SIDES = {"A": "down", "B": "up"}


class AdaMixLoRAMethod(Method[AdaMixLoRA, LinearSite], Collapsing[AdaMixLoRA], Observed[AdaMixLoRA]):
    """``y = W x + b + s B_j A_i drop(x)`` with ``A: [experts, rank, in]`` and ``B: [experts, out, rank]``.

    A shared factor has no leading axis. If the site itself is a mixture of experts, its expert axis comes second.
    """

    objective = Agreement[AdaMixLoRA]

    def insert(self, spec: AdaMixLoRA, site: LinearSite, shared: Any, build: Builder) -> None:
        """Insert the branch.

        Raises:
            GraftError: GC020 when the rank exceeds ``min(in, out)``.
        """
        check_rank(site, spec.rank)
        a = _factor(spec, build, site, "A", (*site.leading, spec.rank, site.in_features), uniform)
        b = _factor(spec, build, site, "B", (*site.leading, site.out_features, spec.rank), zeros)
        add_branch(spec, site, build, a, b, spec.scaling)

    def fold(self, spec: AdaMixLoRA, site: LinearSite, tensors: Mapping[str, Tensor]) -> Fold:
        """Fold the product of the experts' means into the weight: ``W' = W + s mean(B) mean(A)``."""

        def change(weight: Tensor) -> Tensor:
            factors = self.collapsed(spec, tensors)
            return added(weight, factors["B"], factors["A"], spec.scaling)

        return weight_fold(change)

    def readings(self, spec: AdaMixLoRA) -> Sequence[Reading]:
        """Return readings of the drawn experts, one for each factor with experts."""
        return [route_of(part) for part, side in _SIDES.items() if side != spec.share]

    def collapse(self, spec: AdaMixLoRA) -> MethodSpec:
        """Return the spec of a LoRA at the same places."""
        kept = ("name", "target", "rank", "alpha", "dropout", "dropout_mask", "dropout_scope")
        return LoRA(**{field: getattr(spec, field) for field in kept})

    def collapsed(self, spec: AdaMixLoRA, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return both factors, each averaged over its experts."""
        return {part: mean(tensors[part], side, spec.share) for part, side in _SIDES.items()}


def _factor(
    spec: AdaMixLoRA, build: Builder, site: LinearSite, part: str, shape: tuple[int, ...], init: Initialiser
) -> fx.Node:
    if _SIDES[part] == spec.share:
        return build.parameter(part, shape, init, dtype=site.dtype)
    experts = build.parameter(part, (spec.experts, *shape), _alike(init), dtype=site.dtype)
    return pick(build, experts, route(build, experts), part=f"{_SIDES[part]} expert")


def _alike(init: Initialiser) -> Initialiser:
    """Return an initialiser that gives all experts the same values."""

    def fill(tensor: Tensor, generator: torch.Generator) -> None:
        init(tensor[0], generator)
        tensor.copy_(tensor[0].clone().expand_as(tensor))

    return fill
