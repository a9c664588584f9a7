"""Use `graftc::sparse_linear`, which recomputes its weight in the backward pass, for partly trained weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import fx

from graftc.passes.core.build.builder import Builder
from graftc.passes.core.ir.edits import Edit
from graftc.passes.core.ir.program import Program, provenance
from graftc.passes.core.method.capabilities import Reselecting
from graftc.passes.core.method.registry import method_for
from graftc.passes.core.ops.sparse import SAMPLED_BELOW

aten = torch.ops.aten
ops = torch.ops.graftc

WEIGHT = {aten.linear.default: 1, aten.addmm.default: 2}
"""Products to rewrite, each with the index of its weight argument."""


def recompute_weights(build: Builder) -> None:
    """Rewrite the products in the Program of ``build`` whose weights have trained entries."""
    for node in list(build.program.graph.nodes):
        where = WEIGHT.get(node.target)
        if where is None or node.kwargs or provenance(node) is not None:
            continue
        weight = node.args[where]
        if isinstance(weight, fx.Node) and weight.target is ops.sparse_weight.default:
            _take_over(build, node, weight)


def _take_over(build: Builder, node: fx.Node, weight: fx.Node) -> None:
    indices: list[fx.Node] = []
    deltas: list[fx.Node] = []
    origins: list[dict[str, str]] = []
    while weight.target is ops.sparse_weight.default:
        base, places, delta = weight.args
        assert isinstance(base, fx.Node) and isinstance(places, fx.Node) and isinstance(delta, fx.Node)
        indices.insert(0, places)
        deltas.insert(0, delta)
        origins.append(provenance(weight) or {})
        weight = base
    transposed = node.target is aten.addmm.default
    x = node.args[1 if transposed else 0]
    bias = node.args[0] if transposed else (node.args[2] if len(node.args) > 2 else None)
    outermost, sampled = origins[0], _is_sampled(node, weight, indices, origins)
    part = f"{outermost.get('part', 'weight')}, {'sampled' if sampled else 'dense'} gradient"
    after = build.call(ops.sparse_linear.default, x, weight, bias, indices, deltas, transposed, sampled, part=part)
    after.meta["module"] = node.meta.get("module", "")
    after.meta["custom"] = {"graftc": {**outermost, "part": part}}
    _redirect(build.program, node, after, outermost)


def _redirect(program: Program, before: fx.Node, after: fx.Node, origin: dict[str, str]) -> None:
    """Make ``after`` the base's own result, before all insertions at the site."""
    before.replace_all_uses_with(after, delete_user_cb=lambda user: user is not after)
    program.edits.add(Edit(origin.get("adaptation", ""), origin.get("site", ""), before, after))


def _is_sampled(
    node: fx.Node, weight: fx.Node, indices: Sequence[fx.Node], origins: Sequence[Mapping[str, str]]
) -> bool:
    """Return whether to compute gradients entry by entry: if that costs less and the indices stay in order."""
    wide = node.meta["val"].dtype in (torch.float32, torch.float64)
    share = sum(int(places.meta["val"].numel()) for places in indices) / int(weight.meta["val"].numel())
    methods = [method_for(origin.get("method", "")) for origin in origins]
    moving = any(isinstance(method, Reselecting) for method in methods)
    return wide and share < SAMPLED_BELOW and not moving
