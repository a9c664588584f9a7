"""Label mixtures of experts: weights with one matrix per expert, and the maps that choose among them."""

from __future__ import annotations

from torch import fx

from graftc.compiler.roles.assigned_roles import Labels
from graftc.compiler.roles.flow import Residual
from graftc.compiler.roles.maps import Linear
from graftc.compiler.roles.operators import SOFTMAX
from graftc.passes.core.sites.calls import op_name

_CHOOSING = frozenset({"topk", "argmax", "max", "sort"})


def read_experts(labels: Labels) -> None:
    """Label routers, and the 3-D weights that they choose from.

    A router is a linear map with one output column per expert. Its columns are compared within one residual branch, and
    no attention layer depends on the choice. 3-D weights without a router get no role: they may be any kind of head.
    """
    experts = [e for e in labels.flow.linears.values() if e.experts]
    choices = [(node, r) for node in labels.flow.order if (r := _chosen_in(labels, node)) is not None]
    choices.sort(key=lambda choice: op_name(choice[0]) in SOFTMAX)
    chosen: set[fx.Node] = set()
    for node, residual in choices:
        candidates = [e for e in experts if labels.between(residual.base, e.node, residual.branch)]
        for source in labels.nearest_linears(node):
            linear = labels.flow.linears[source]
            if labels.between(residual.base, source, node) and _routes(labels, node, linear, candidates):
                labels.linear("router", linear, None, f"its output chooses the experts in {node.name}")
                chosen.update(e.node for e in candidates)
    for expert in experts:
        if expert.node in chosen:
            labels.linear("experts", expert, None, "a 3-D weight, one matrix per expert")
        else:
            labels.fail(expert.node, "a 3-D weight that no router chooses from")


def _routes(labels: Labels, node: fx.Node, linear: Linear, linears: list[Linear]) -> bool:
    """Return whether a choice compares one column of a map per expert or, without experts, chooses among several."""
    compared = labels.linear_columns(node.args[0]).get(linear.node) if isinstance(node.args[0], fx.Node) else None
    counts = {linear.out, linear.out if compared is None else compared.numel()}
    if linears:
        return bool(counts & {_count(labels, e) for e in linears})
    return op_name(node) in ("topk", "argmax") and linear.out > 1


def _count(labels: Labels, linear: Linear) -> int:
    """Return the number of experts in a 3-D weight."""
    stored = next(n for n in labels.flow.parameters(linear.weight) if str(n.target) == linear.parameter)
    return int(labels.flow.sizes.size(stored.meta["val"].shape[0]))


def _chosen_in(labels: Labels, node: fx.Node) -> Residual | None:
    """Return the residual branch in which a choice is made, if any, unless attention in it depends on the choice."""
    flow = labels.flow
    if op_name(node) not in _CHOOSING and op_name(node) not in SOFTMAX:
        return None
    for residual in flow.residuals.values():
        if labels.between(residual.base, node, residual.branch):
            inside = labels.inside(residual.base, residual.branch)
            sees = any(n in flow.attentions and flow.is_above(node, n) for n in inside)
            return None if sees else residual
    return None
