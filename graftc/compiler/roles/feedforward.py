"""Feed-forward projections: what a residual branch contains besides attention, experts and mixers."""

from __future__ import annotations

import torch
from torch import fx

from graftc.compiler.roles.assigned_roles import Labels
from graftc.compiler.roles.columns import Through
from graftc.compiler.roles.experts import read_experts
from graftc.compiler.roles.flow import bits, tensor_nodes
from graftc.compiler.roles.maps import Linear
from graftc.compiler.roles.mixers import mixing, read_mixers
from graftc.passes.core.sites.calls import op_name


def read_branches(labels: Labels) -> None:
    """Label what each residual branch contains besides attention, inner branches first."""
    read_experts(labels)
    for residual in labels.flow.residuals.values():
        read_mixers(labels, residual)
        for node in labels.nearest_linears(residual.branch):
            if not labels.has_role(node):
                _feed_forward(labels, labels.flow.linears[node])


def _feed_forward(labels: Labels, down: Linear) -> None:
    """Label the feed-forward that ``down`` ends.

    What ``down`` reads must come from one linear map, or from a gated pair or fused one.
    """
    inner = labels.nearest(down.input)
    linears = [n for n in inner if n in labels.flow.linears]
    if not linears:
        labels.fail(down.node, "is a gate on its residual branch, or the branch has no other linear map")
        return
    odd = _unfit(labels, down, linears)
    if odd:
        for node in (down.node, *(n for n in linears if not labels.has_role(n))):
            labels.fail(node, odd)
        return
    if len(linears) < len(inner):
        other = next(n for n in inner if n not in labels.flow.linears)
        labels.fail(
            down.node,
            f"reads {op_name(other) or other.name} beside the output of {labels.module(linears[0])}",
        )
        return
    for node in linears:
        before = labels.nearest_linears(labels.flow.linears[node].input)
        stages = [n for n in before if n not in linears and not labels.in_stream(n)]
        if stages:
            labels.fail(down.node, "ends a residual branch of more than two linear maps in a row")
            for stage in (node, *stages):
                if not labels.has_role(stage):
                    labels.fail(stage, "one of more than two linear maps in a row in a residual branch")
            return
    if not _inner(labels, down, linears):
        return
    labels.linear("ffn.down", down, None, "ends a residual branch, reads the inner activation")


def _unfit(labels: Labels, down: Linear, linears: list[fx.Node]) -> str:
    """Return why these maps cannot be a position-wise feed-forward, or an empty string."""
    flow = labels.flow
    maps = [down, *(flow.linears[n] for n in linears)]
    if any(m.experts for m in maps):
        return "meets a 3-D weight that no router chooses from"
    if any(m.mixes for m in maps):
        return "a convolution over positions stands in its residual branch"
    between = flow.above[flow.at[down.node]] & mixing(labels)
    for at in bits(between):
        if any(flow.above[at] >> flow.at[n] & 1 for n in linears):
            return f"{flow.order[at].name} mixes positions between it and the other linear map"
    return ""


def _inner(labels: Labels, down: Linear, linears: list[fx.Node]) -> bool:
    """Label the projections that ``down`` reads, and return whether they fit a known form."""
    product = _gated_product(labels, down.input)
    if product is None:
        if len(linears) > 1:
            for node in (down.node, *linears):
                if not labels.has_role(node):
                    labels.fail(node, "several linear maps meet before the last one, but not as a gated product")
            return False
        columns = labels.linear_columns(down.input).get(linears[0])
        if columns is None:
            for node in (down.node, linears[0]):
                labels.fail(node, f"columns of the input of {labels.module(down.node)} cannot be followed")
            return False
        if labels.has_role(linears[0], columns):
            labels.fail(down.node, f"reads {labels.module(linears[0])}, which has another role")
            return False
        up = labels.flow.linears[linears[0]]
        labels.linear("ffn.up", up, columns, f"feeds {labels.short(down.node)}{_nonlinearity(labels, down.input)}")
        return True
    sides = [labels.columns.through[n] & Through.NONLINEAR for n in product]
    if bool(sides[0]) == bool(sides[1]):
        reason = "both" if sides[0] else "neither"
        for node in (down.node, *linears):
            labels.fail(node, f"{reason} of the factors of {product[0].name} * {product[1].name} are nonlinear")
        return False
    explained = {n for side in product for n in labels.linear_columns(side)}
    if explained != set(linears):
        for node in (down.node, *linears):
            labels.fail(node, "more reaches the last linear map of the branch than the two factors of a gated product")
        return False
    gate, up_side = product if sides[0] else product[::-1]
    for role, side in (("ffn.gate", gate), ("ffn.up", up_side)):
        how = "through the nonlinearity" if side is gate else "as the factor beside the gate"
        for node, columns in labels.linear_columns(side).items():
            if not labels.has_role(node, columns):
                evidence = f"feeds {labels.short(down.node)} {how}"
                labels.linear(role, labels.flow.linears[node], columns, evidence)
    return True


def _nonlinearity(labels: Labels, node: fx.Node) -> str:
    through = labels.columns.through.get(node, Through.NOTHING)
    return " through a nonlinearity" if through & Through.NONLINEAR else ""


def _gated_product(labels: Labels, node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """Return the factors of the nearest product above ``node`` whose two factors consist of different columns."""
    pending, seen = [node], {node}
    while pending:
        current = pending.pop(0)
        if current in labels.columns.number:
            continue
        if op_name(current) == "mul":
            factors = tensor_nodes(current.args[:2])
            if len(factors) == 2:
                columns = [labels.linear_columns(n) for n in factors]
                if columns[0] and columns[1] and not _overlap(columns[0], columns[1]):
                    return factors[0], factors[1]
        for source in current.all_input_nodes:
            if source not in seen and labels.columns.front.get(source):
                seen.add(source)
                pending.append(source)
    return None


def _overlap(first: dict[fx.Node, torch.Tensor], second: dict[fx.Node, torch.Tensor]) -> bool:
    return any(n in second and bool(torch.isin(c, second[n]).any()) for n, c in first.items())
