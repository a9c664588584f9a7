"""Label feed-forward projections: those in residual branches that are not part of attention, experts or mixers."""

from __future__ import annotations

import torch
from torch import fx

from graftc.compiler.roles.assigned_roles import Labels
from graftc.compiler.roles.columns import Through
from graftc.compiler.roles.experts import read_experts
from graftc.compiler.roles.flow import tensor_nodes
from graftc.compiler.roles.maps import Linear
from graftc.compiler.roles.mixers import mixing, read_mixers
from graftc.passes.core.sites.calls import op_name
from graftc.passes.core.worklist import Worklist

Misfits = list[tuple[fx.Node, str]]
"""Nodes that do not fit a known form, with the reasons; empty if a feed-forward part was labelled."""


def read_branches(labels: Labels) -> None:
    """Label the experts, mixers and feed-forward parts in each residual branch, inner branches first."""
    read_experts(labels)
    for residual in labels.flow.residuals.values():
        read_mixers(labels, residual)
        for node in labels.nearest_linears(residual.branch):
            if not labels.has_role(node):
                for misfit, reason in _feed_forward(labels, labels.flow.linears[node]):
                    labels.fail(misfit, reason)


def _feed_forward(labels: Labels, down: Linear) -> Misfits:
    """Label the feed-forward part that ends in ``down``.

    The input of ``down`` must come from one linear map, or from a gated pair, which may be fused.
    """
    inner = labels.nearest(down.input)
    linears = [n for n in inner if n in labels.flow.linears]
    if not linears:
        return [(down.node, "is a gate on its residual branch, or the branch has no other linear map")]
    odd = _unfit(labels, down, linears)
    if odd:
        return [(n, odd) for n in (down.node, *linears) if not labels.has_role(n)]
    if len(linears) < len(inner):
        other = next(n for n in inner if n not in labels.flow.linears)
        reads = op_name(other) or other.name
        return [(down.node, f"reads {reads} in addition to the output of {labels.module(linears[0])}")]
    for node in linears:
        before = labels.nearest_linears(labels.flow.linears[node].input)
        stages = [n for n in before if n not in linears and not labels.in_stream(n)]
        if stages:
            reason = "one of more than two linear maps in a row in a residual branch"
            rest = [(stage, reason) for stage in (node, *stages) if not labels.has_role(stage)]
            return [(down.node, "ends a residual branch of more than two linear maps in a row"), *rest]
    misfits = _inner(labels, down, linears)
    if not misfits:
        labels.linear("ffn.down", down, None, "ends a residual branch, reads the inner activation")
    return misfits


def _unfit(labels: Labels, down: Linear, linears: list[fx.Node]) -> str:
    """Return why these maps cannot be a position-wise feed-forward part; an empty string if they can."""
    flow = labels.flow
    maps = [down, *(flow.linears[n] for n in linears)]
    if any(m.experts for m in maps):
        return "meets a 3-D weight that no router chooses from"
    if any(m.mixes for m in maps):
        return "its residual branch contains a convolution over positions"
    for node in flow.nodes(flow.above[flow.at[down.node]] & mixing(labels)):
        if any(flow.is_above(n, node) for n in linears):
            return f"{node.name} mixes positions between it and the other linear map"
    return ""


def _inner(labels: Labels, down: Linear, linears: list[fx.Node]) -> Misfits:
    """Label the projections that ``down`` reads, if they fit a known form."""
    product = _gated_product(labels, down.input)
    maps = (down.node, *linears)
    if product is None:
        if len(linears) > 1:
            reason = "several linear maps meet before the last one, but not as a gated product"
            return [(n, reason) for n in maps if not labels.has_role(n)]
        columns = labels.linear_columns(down.input).get(linears[0])
        if columns is None:
            return [(n, f"columns of the input of {labels.module(down.node)} cannot be followed") for n in maps]
        if labels.has_role(linears[0], columns):
            return [(down.node, f"reads {labels.module(linears[0])}, which has another role")]
        up = labels.flow.linears[linears[0]]
        labels.linear("ffn.up", up, columns, f"feeds {labels.short(down.node)}{_nonlinearity(labels, down.input)}")
        return []
    sides = [labels.columns.through[n] & Through.NONLINEAR for n in product]
    if bool(sides[0]) == bool(sides[1]):
        which = "both" if sides[0] else "neither"
        return [(n, f"{which} of the factors of {product[0].name} * {product[1].name} are nonlinear") for n in maps]
    if {n for side in product for n in labels.linear_columns(side)} != set(linears):
        reason = "the last linear map of the branch reads more than the two factors of a gated product"
        return [(n, reason) for n in maps]
    gate, up_side = product if sides[0] else product[::-1]
    for role, side in (("ffn.gate", gate), ("ffn.up", up_side)):
        how = "through the nonlinearity" if side is gate else "as the factor beside the gate"
        for node, columns in labels.linear_columns(side).items():
            if not labels.has_role(node, columns):
                labels.linear(role, labels.flow.linears[node], columns, f"feeds {labels.short(down.node)} {how}")
    return []


def _nonlinearity(labels: Labels, node: fx.Node) -> str:
    through = labels.columns.through.get(node, Through.NOTHING)
    return " through a nonlinearity" if through & Through.NONLINEAR else ""


def _gated_product(labels: Labels, node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """Return the factors of the nearest product above ``node`` whose factors consist of different columns."""
    nodes = Worklist([node], nearest_first=True)
    for current in nodes:
        if current in labels.columns.number:
            continue
        factors = tensor_nodes(current.args[:2]) if op_name(current) == "mul" else []
        if len(factors) == 2:
            first, second = (labels.linear_columns(n) for n in factors)
            if first and second and not _overlap(first, second):
                return factors[0], factors[1]
        nodes += filter(labels.columns.front.get, current.all_input_nodes)
    return None


def _overlap(first: dict[fx.Node, torch.Tensor], second: dict[fx.Node, torch.Tensor]) -> bool:
    return any(n in second and bool(torch.isin(c, second[n]).any()) for n, c in first.items())
