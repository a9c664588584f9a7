"""Effective weights: a site's weight and offset, including the adaptations inserted so far, as graph nodes.

If nothing has been inserted at the site, the weight is the base's own. Otherwise, the folds of the site's adaptations
are inserted as nodes, in order: a fold is a pure function ``(W, b) -> (W', b')``, so a method that needs the effective
weight works on top of every method that folds, without depending on any of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from graftc.passes.core.build.builder import Builder
from graftc.passes.core.ir.cleaning import takes_device
from graftc.passes.core.ir.edits import Edit
from graftc.passes.core.ir.program import map_nodes
from graftc.passes.core.sites.sites import Applied, LinearSite
from graftc.passes.core.weights.folds import Keep, WeightFold
from graftc.specs.errors.diagnostics import GraftError

aten = torch.ops.aten

NO_BIAS = "no bias"
"""The part label of the zeros that represent a site's bias before the first adaptation that adds one."""


@dataclass(frozen=True)
class EffectiveWeight:
    """A site's weight and offset, including the adaptations inserted so far.

    Attributes:
        weight: the weight, ``[..., rows, in]``: in the base's dtype if it is not adapted, else in at least float32.
        offset: the term added to ``W x``, broadcastable to the site's output, or None.
        fixed: whether the weight is the base's own and nothing trains it.
        value: a function that computes the current value of ``weight``, in the dtype of that node.
    """

    weight: fx.Node
    offset: fx.Node | None
    fixed: bool
    value: Callable[[], Tensor]


def effective_weight(build: Builder, site: LinearSite) -> EffectiveWeight:
    """Return the effective weight of ``site`` as it is before the adaptation that ``build`` builds.

    Raises:
        GraftError: GC017 if an adaptation of the site cannot be expressed as a change to the weight, or if ``build``
            builds a bank at a site that is already adapted.
    """
    weight, offset = build.weight(site), build.offset(site)
    _check_known(build, site)
    if site.applied and build.composed:
        raise _refusal(build, site, site.applied[-1].adaptation, "a bank starts from one weight for all of its slots")
    if not site.applied:
        return EffectiveWeight(weight, offset, not build.is_overlaid(site.own.tensor), lambda: build.read_weight(site))
    wide = torch.promote_types(weight.meta["val"].dtype, torch.float32)
    bias = build.bias(site)
    adapted = _widened(build, weight, wide), None if bias is None else _widened(build, bias, wide)
    for item in site.applied:
        adapted = _after(build, site, item, *adapted, wide)
    if adapted[1] is not None:
        offset = adapted[1]
    names = [name for item in site.applied for name in item.parts.values()]
    function = _chain(build, site, site.applied, bias is not None)

    def value() -> Tensor:
        tensors = [build.store.get(name).detach() for name in names]
        own = [build.read_weight(site)]
        if site.own_bias is not None:
            own.append(site.own_bias.take(build.store.get(site.own_bias.tensor).detach()))
        cast = [t.to(wide) if t.is_floating_point() else t for t in (*own, *tensors)]
        with torch.no_grad():
            result: Tensor = function(*cast)[0]
        return result

    return EffectiveWeight(adapted[0], offset, False, value)


def _after(
    build: Builder, site: LinearSite, item: Applied, weight: fx.Node, bias: fx.Node | None, wide: torch.dtype
) -> tuple[fx.Node, fx.Node | None]:
    """Return the weight and bias after one adaptation.

    Each is recorded as an edit, together with the node that it replaces, which is needed once the adaptation has been
    folded into the base tensors.
    """
    tensors = [_widened(build, build.attribute(name), wide) for name in item.parts.values()]
    sources = [weight, *([bias] if bias is not None else []), *tensors]
    adapted, *biases = trace(build, _chain(build, site, [item], bias is not None), sources, "weight so far")
    changes = [(weight, adapted)]
    if biases:
        size = list(biases[0].meta["val"].shape)
        before = bias or build.call(aten.new_zeros.default, weight, size, part=NO_BIAS)
        changes.append((before, biases[0]))
    for before, after in changes:
        if after is not before:
            where = f"{site.key} of {build.adaptation}"
            build.program.edits.add(Edit(item.adaptation, where, before, after, narrow=True))
    return adapted, biases[0] if biases else None


def trace(build: Builder, function: Callable[..., Any], nodes: Sequence[fx.Node], part: str) -> list[fx.Node]:
    """Trace ``function`` applied to ``nodes`` into the graph and return the nodes of its results.

    Args:
        build: the builder that inserts the calls.
        function: a function that takes tensors and returns a sequence of tensors; it may inspect their shapes and
            dtypes, but not their values.
        nodes: the nodes of its arguments.
        part: the part label of the new nodes.

    Raises:
        RuntimeError: if the function's control flow depends on a value, or if it creates a constant tensor.
    """
    with build.fake():
        # Nodes of the same shape and dtype share one fake tensor, but tracing needs a distinct one for each argument.
        values = [torch.empty_like(node.meta["val"]) for node in nodes]
        traced = make_fx(function, pre_dispatch=True)(*values).graph
    known: dict[fx.Node, fx.Node] = dict(zip(traced.find_nodes(op="placeholder"), nodes, strict=True))
    for node in traced.nodes:
        if node.op == "get_attr":
            raise RuntimeError(f"it creates a constant tensor ({node.target})")
        if node.op != "call_function":
            continue
        args, kwargs = map_nodes((node.args, dict(node.kwargs)), known.__getitem__)
        if takes_device(node.target):
            kwargs = {k: v for k, v in kwargs.items() if k not in ("device", "pin_memory", "layout")}
        known[node] = build.call(node.target, *args, part=part, **kwargs)
    (results,) = traced.output_node().args
    return [known[node] for node in results]  # type: ignore[union-attr,index]


def _chain(build: Builder, site: LinearSite, applied: Sequence[Applied], biased: bool) -> Callable[..., list[Tensor]]:
    """Return the folds of ``applied`` as one function of the weight, the bias (if any) and all adapter tensors."""

    def function(weight: Tensor, *rest: Tensor) -> list[Tensor]:
        bias, tensors = (rest[0], list(rest[1:])) if biased else (None, list(rest))
        for item in applied:
            own, tensors = tensors[: len(item.parts)], tensors[len(item.parts) :]
            weight, bias = _apply(build, site, item, dict(zip(item.parts, own, strict=True)), weight, bias)
        return [weight] if bias is None else [weight, bias]

    return function


def _apply(
    build: Builder, site: LinearSite, item: Applied, tensors: dict[str, Tensor], weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    try:
        fold = item.fold(tensors)
        if isinstance(fold, WeightFold):
            return fold.apply(weight, bias)
    except RuntimeError as error:
        raise _refusal(build, site, item.adaptation, f"its fold depends on tensor values: {error}") from error
    if isinstance(fold, Keep):
        raise _refusal(build, site, item.adaptation, fold.reason)
    return weight, bias


def _check_known(build: Builder, site: LinearSite) -> None:
    """Raise GC017 if rows are replaced (for example, for new tokens) by anything but the site's adaptations."""
    names = {item.adaptation for item in site.applied}
    tensor, node = str(site.key.whole), site.use.node
    while (edit := build.program.edits.replacement(node)) is not None:
        if edit.adaptation not in names and edit.site == tensor:
            raise _refusal(build, site, edit.adaptation, "it replaces rows where they are read")
        node = edit.after


def _refusal(build: Builder, site: LinearSite, other: str, reason: str) -> GraftError:
    return GraftError(
        "GC017",
        f"{build.adaptation!r} needs the effective weight of {site.key}, but {other!r}, which comes before it, "
        f"cannot be expressed as a weight: {reason}",
        hint=f"put {build.adaptation!r} before {other!r} in the spec, or leave the site out of one of them",
    )


def _widened(build: Builder, node: fx.Node, wide: torch.dtype) -> fx.Node:
    value = node.meta["val"]
    if not value.is_floating_point() or value.dtype == wide:
        return node
    return build.call(aten.to.dtype, node, wide, part="widen")
