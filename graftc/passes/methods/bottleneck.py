"""Bottleneck adapters: one mechanism that named adapters wire differently (Houlsby et al. 2019, arXiv:1902.00751)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, fx

from graftc.passes.core.build.builder import Builder, Initialiser
from graftc.passes.core.method.capabilities import Exchangeable
from graftc.passes.core.method.lowrank import normal, ones, uniform, within, zeros
from graftc.passes.core.method.method import Method
from graftc.passes.core.sites.sites import LinearSite, SublayerSite, unsupported
from graftc.passes.core.sites.uses import Dense
from graftc.passes.core.weights.folds import Fold, Keep
from graftc.specs.base import MethodSpec
from graftc.specs.errors.diagnostics import GraftError, Place
from graftc.specs.methods.bottleneck import Bottleneck, BottleneckSpec

aten = torch.ops.aten
S = TypeVar("S", bound=BottleneckSpec)

_ACTIVATIONS: Mapping[str, tuple[Any, Mapping[str, Any]]] = {
    "relu": (aten.relu.default, {}),
    "gelu": (aten.gelu.default, {}),
    "gelu_tanh": (aten.gelu.default, {"approximate": "tanh"}),
    "silu": (aten.silu.default, {}),
    "tanh": (aten.tanh.default, {}),
    "leaky_relu": (aten.leaky_relu.default, {}),
}

_EXCHANGED = ("bottleneck", "reduction", "bias", "init", "init_std", "scale", "dropout", "overrides")
"""Fields in which adapters for one graph may differ."""


class BottleneckAdapter(Method[S, LinearSite | SublayerSite], Exchangeable[S]):
    """``value + s (U f(D x + b) + c)`` with ``D: [bottleneck, read]``, ``U: [added, bottleneck]``.

    ``x`` is the value that the adapter reads, through its own layer norm if it has one, and ``value`` is the value that
    it adds to; the spec's wiring determines both. Dropout acts on the bottleneck. The function is not linear, so it
    cannot be folded and stays in the graph.
    """

    def insert(self, spec: S, site: LinearSite | SublayerSite, shared: Any, build: Builder) -> None:
        """Insert the adapter.

        Raises:
            GraftError: GC017 if the site does not provide the values that the adapter reads or adds to, GC020 if the
                bottleneck would have a width of zero.
        """
        wiring = spec.wiring(site.kind, site.roles)
        if isinstance(site, SublayerSite):
            read, value = build.at(site, wiring.reads), build.at(site, wiring.adds_to)
            delta = self.branch(spec, build, read, _width(value), site.dtype)
            build.add_at(site, wiring.adds_to, delta, wiring.reads)
            return
        if not isinstance(site.use, Dense):
            raise unsupported(site, "is not a product of its input with a matrix on the right")
        read = build.input(site) if wiring.reads == "input" else build.output(site)
        inward = wiring.adds_to == "input"
        width = site.in_features if inward else site.out_features
        if inward and wiring.reads != "input":
            raise GraftError("GC017", f"an adapter cannot read the output of {site.key} and add to its input")
        delta = self.branch(spec, build, read, width, site.dtype)
        if inward:
            build.set_input(site, build.call(aten.add.Tensor, read, delta, part="add"))
        else:
            build.add(site, delta)

    def branch(self, spec: S, build: Builder, read: fx.Node, width: int, dtype: torch.dtype) -> fx.Node:
        """Build the adapter's result for ``read``, ``[..., width]``, computed in the dtype of the adapter's tensors."""
        if read.meta["val"].dtype != dtype:  # experts are summed in float32
            read = build.call(aten.to.dtype, read, dtype, part="read")
        norm = spec.wiring(build.site.kind, build.site.roles).norm
        inner = spec.width(_width(read))
        if inner < 1:
            message = f"reduction {spec.reduction:g} leaves no bottleneck for an input of width {_width(read)}"
            raise GraftError("GC020", message, place=Place(path="reduction"))
        x = _normed(build, read, _width(read), dtype, "norm") if norm in ("before", "both") else read
        hidden = self.project(spec, build, "down", x, inner, dtype)
        hidden = build.dropout(_activated(spec, build, hidden), spec.dropout)
        delta = self.project(spec, build, "up", hidden, width, dtype)
        if norm in ("after", "both"):
            delta = _normed(build, delta, width, dtype, "norm_after")
        if spec.scale == "learned":
            scale = build.parameter("scale", (1,), ones, dtype=dtype)
            return build.call(aten.mul.Tensor, delta, build.along(scale, delta), part="scale")
        return delta if spec.scale == 1 else build.call(aten.mul.Tensor, delta, spec.scale, part="scale")

    def project(self, spec: S, build: Builder, part: str, x: fx.Node, out: int, dtype: torch.dtype) -> fx.Node:
        """Build one projection, ``down`` or ``up``: its weight ``[out, in]``, and its bias if the spec has one."""
        weight = build.parameter(part, (out, _width(x)), initialiser(spec, part), dtype=dtype)
        bias = build.parameter(f"{part}_bias", (out,), zeros, dtype=dtype) if spec.bias else None
        return build.linear(x, weight, bias, part=part)

    def exchangeable(self, spec: S, size: int) -> MethodSpec:
        """Return the adapter with a bottleneck of this width and with biases, whose scale is 1."""
        fields = {f: getattr(spec, f) for f in type(spec).model_fields if f not in _EXCHANGED}
        return type(spec)(bottleneck=size, bias=True, init="lora", scale=1.0, **fields)

    def exchanged(self, spec: S, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return the tensors with the scale in the last of the adapter's own maps, and with biases."""
        biases = {f"{part}_bias": tensors[part].new_zeros(tensors[part].shape[0]) for part in ("down", "up")}
        every: dict[str, Any] = {**biases, **tensors}
        scale = every.pop("scale", spec.scale)
        last = ("norm_after_weight", "norm_after_bias") if "norm_after_weight" in every else ("up", "up_bias")
        return {**every, **{part: every[part] * scale for part in last}}

    def fold(self, spec: S, site: LinearSite | SublayerSite, tensors: Mapping[str, Tensor]) -> Fold:
        """Keep the adapter in the graph, since no weight of the base can compute it."""
        return Keep("it has its own activation function, so no weight of the base can compute it")


class BottleneckMethod(BottleneckAdapter[Bottleneck]):
    """`BottleneckAdapter` with the wiring that its spec defines."""


def _width(node: fx.Node) -> int:
    return int(node.meta["val"].shape[-1])


def _activated(spec: BottleneckSpec, build: Builder, x: fx.Node) -> fx.Node:
    if spec.activation == "identity":
        return x
    target, kwargs = _ACTIVATIONS[spec.activation]
    return build.call(target, x, part="activation", **kwargs)


def _normed(build: Builder, x: fx.Node, width: int, dtype: torch.dtype, part: str) -> fx.Node:
    weight = build.parameter(f"{part}_weight", (width,), ones, dtype=dtype)
    bias = build.parameter(f"{part}_bias", (width,), zeros, dtype=dtype)
    return build.layer_norm(x, weight, bias, part)


def initialiser(spec: BottleneckSpec, part: str) -> Initialiser:
    """Return the initialiser of the weight of a projection (``down`` or ``up``), ``[..., out, in]``."""
    if spec.init == "lora":
        return uniform if part == "down" else zeros
    if spec.init == "bert":
        return normal(spec.init_std or 0.02)
    return _xavier if spec.init == "xavier" else _truncated(spec.init_std or 1e-3)


def _xavier(tensor: Tensor, generator: torch.Generator) -> None:
    within(math.sqrt(6 / sum(tensor.shape[-2:])))(tensor, generator)


def _truncated(deviation: float) -> Initialiser:
    """Return a normal initialiser, truncated at two standard deviations."""

    def fill(tensor: Tensor, generator: torch.Generator) -> None:
        torch.nn.init.trunc_normal_(tensor, 0, deviation, -2 * deviation, 2 * deviation, generator=generator)

    return fill
