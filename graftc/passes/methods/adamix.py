"""AdaMix: bottleneck adapters whose experts are drawn in each forward pass (Wang et al. 2022, arXiv:2205.12410)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor, fx
from torch.nn import functional

from graftc.passes.core.build.builder import Builder
from graftc.passes.core.build.random_experts import pick, route
from graftc.passes.core.method.capabilities import Collapsing, Observed, Reading
from graftc.passes.core.method.lowrank import zeros
from graftc.passes.core.method.steering import OutputObjective, wide
from graftc.passes.methods.bottleneck import BottleneckAdapter, initialiser
from graftc.specs.base import MethodSpec
from graftc.specs.methods.adamix import AdaMix
from graftc.specs.methods.adamix_lora import AdaMixLoRA
from graftc.specs.methods.bottleneck import WIDTHS, Bottleneck

M = TypeVar("M", AdaMix, AdaMixLoRA)


class Agreement(OutputObjective[M]):
    """``weight / 2 (KL(p1 || p2) + KL(p2 || p1))``, where ``p1`` and ``p2`` are the softmax of two passes' logits.

    The logits, ``[..., classes]``, are the output with that name or, if there is none, the first floating-point output
    other than the loss. The divergence is summed over classes and averaged over the other axes, in float32; it is zero
    for a single class.
    """

    passes = 2

    @classmethod
    def wanted(cls, spec: M) -> bool:
        """Return whether the term's weight is above zero."""
        return spec.consistency.weight > 0

    def value(self, outputs: Sequence[Mapping[str, Tensor]], counted: Tensor | None) -> Tensor:
        """Return the weighted divergence between the two passes, averaged over all or only ``counted`` positions."""
        consistency = self.spec.consistency
        first, second = (torch.log_softmax(wide(_logits(tensors)), -1) for tensors in outputs)
        rows = (_divergence(first, second, consistency.detach) + _divergence(second, first, consistency.detach)) / 2
        if counted is not None and counted.shape == rows.shape:
            return consistency.weight * (rows * counted).sum() / counted.sum().clamp_min(1)
        return consistency.weight * rows.mean()


def _logits(outputs: Mapping[str, Tensor]) -> Tensor:
    logits = outputs.get("logits")
    if logits is not None:
        return logits
    return next(t for name, t in outputs.items() if name != "loss" and t.is_floating_point())


def _divergence(target: Tensor, other: Tensor, detach: bool) -> Tensor:
    """Return ``KL(target || other)`` of log-probabilities ``[..., classes]``, as ``[...]``."""
    return functional.kl_div(other, target.detach() if detach else target, reduction="none", log_target=True).sum(-1)


class AdaMixMethod(BottleneckAdapter[AdaMix], Collapsing[AdaMix], Observed[AdaMix]):
    """``g + s (U_j gelu(D_i g + b_i) + c_j)`` on a feed-forward part.

    The projections are ``D: [experts, bottleneck, width]`` and ``U: [experts, width, bottleneck]``; a shared one has no
    leading axis. A projection's weight and bias belong to the same expert. ``i`` and ``j`` are drawn for each site and
    projection.
    """

    objective = Agreement[AdaMix]

    def project(self, spec: AdaMix, build: Builder, part: str, x: fx.Node, out: int, dtype: torch.dtype) -> fx.Node:
        """Build a projection that picks one of its experts, or a shared projection without experts."""
        if part == spec.share:
            return super().project(spec, build, part, x, out, dtype)
        shape = (spec.experts, out, int(x.meta["val"].shape[-1]))
        experts = build.parameter(part, shape, initialiser(spec, part), dtype=dtype)
        chosen = route(build, experts)
        bias = None
        if spec.bias:
            biases = build.parameter(f"{part}_bias", (spec.experts, out), zeros, dtype=dtype)
            bias = pick(build, biases, chosen, part=f"{part} expert")
        return build.linear(x, pick(build, experts, chosen, part=f"{part} expert"), bias, part=part)

    def readings(self, spec: AdaMix) -> Sequence[Reading]:
        """Return readings of the drawn experts, one for each projection with experts."""
        return [route_of(part) for part in ("down", "up") if part != spec.share]

    def collapse(self, spec: AdaMix) -> MethodSpec:
        """Return the spec of a single bottleneck adapter at the same places."""
        kept = ("name", "target", "activation", "bias", "init", "init_std", "scale", "dropout", "overrides")
        width = next((f for f in WIDTHS if f in spec.model_fields_set and getattr(spec, f) is not None), "bottleneck")
        values = {field: getattr(spec, field) for field in (*kept, width)}
        return Bottleneck(reads="projection", adds_to="projection", **values)

    def collapsed(self, spec: AdaMix, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return the tensors with the experts of each projection averaged."""
        return {part: mean(tensor, part.removesuffix("_bias"), spec.share) for part, tensor in tensors.items()}


def route_of(part: str) -> Reading:
    """Return the reading ``PART_route``: the index of the expert that a forward pass picked for ``part``."""
    return Reading(f"{part}_route", part, (torch.ops.aten.index_select.default,), lambda args, _: args[2].squeeze())


def mean(tensor: Tensor, side: str, share: str) -> Tensor:
    """Return the mean over the experts if ``side`` is a projection, ``up`` or ``down``; otherwise the tensor unchanged.

    A shared projection is returned unchanged as well.
    """
    return tensor if side == share or side not in ("up", "down") else tensor.mean(0)
