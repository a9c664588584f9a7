"""Label branches that mix positions without softmax attention: state-space, linear-attention and convolutional layers.

The rule is based on data flow. A residual branch mixes positions if it contains a convolution along positions, a
product of two data-dependent values, a running sum, a Fourier transform, a shift along positions, a pooling window, or
a linear map over positions. A plain sum or mean alone is not enough, because its axis cannot always be determined.
Every linear map or convolution that is such an operation, or lies before or after one, is a ``mixer``, as is every map
that feeds a mixer. Maps on a path with an attention call are left out, because their purpose cannot be determined.
"""

from __future__ import annotations

from torch import Tensor, fx

from graftc.compiler.roles.assigned_roles import Labels
from graftc.compiler.roles.flow import Residual
from graftc.compiler.roles.indices import varying
from graftc.compiler.roles.operators import PADDING, POOLING, RESIZING, RUNNING, SOFTMAX
from graftc.passes.core.sites.calls import op_name

_SUMMING = POOLING - RUNNING
_WEIGHING = SOFTMAX | {"logsumexp", "log_softmax"}


def read_mixers(labels: Labels, residual: Residual) -> None:
    """Label the projections of a branch that mixes positions."""
    flow = labels.flow
    inside = labels.inside(residual.base, residual.branch)
    places = flow.between(residual.base, residual.branch, mixing(labels))
    attentions = [n for n in inside if n in flow.attentions]
    soft = [n for n in places if _sums(labels, n) and _weighted(labels, residual, n)]
    pooled = [n for n in places if op_name(n) in _SUMMING and n not in soft]
    places = [n for n in places if n not in soft and n not in pooled]
    mixers: list[fx.Node] = []
    for node in reversed(inside):
        linear = flow.linears.get(node) or flow.depthwise.get(node)
        if linear is None or linear.experts or labels.has_role(node) or _met(labels, node, attentions):
            continue
        met, pool = _met(labels, node, places), _met(labels, node, pooled)
        weighed = _met(labels, node, soft)
        fed = next((n for n in mixers if flow.is_above(node, n)), None)
        if weighed is not None:
            labels.fail(node, f"{weighed.name} applies softmax weights, but is not a known form of attention")
            continue
        if met is node:
            evidence = "mixes positions without attention"
        elif met is not None:
            side = "leads to" if flow.is_above(node, met) else "reads from"
            evidence = f"{side} {met.name}, which mixes positions without attention"
        elif fed is not None:
            evidence = f"feeds {labels.short(fed)} in a branch that mixes positions without attention"
        elif pool is not None:
            labels.fail(node, f"{pool.name} pools along positions, or along copies of the same columns")
            continue
        else:
            continue
        mixers.append(node)
        labels.linear("mixer", linear, None, evidence)


def _met(labels: Labels, node: fx.Node, others: list[fx.Node]) -> fx.Node | None:
    """Return the first of ``others`` that a node is, leads to or is computed from."""
    flow = labels.flow
    return next((n for n in others if n is node or flow.is_above(node, n) or flow.is_above(n, node)), None)


def _weighted(labels: Labels, residual: Residual, node: fx.Node) -> bool:
    """Return whether a node depends on a softmax in the branch."""
    return any(op_name(n) in _WEIGHING for n in labels.flow.between(residual.base, node) if n is not node)


def mixing(labels: Labels) -> int:
    """Return the nodes that mix positions and are not part of an attention computation, as a bit set."""
    if labels.mixing is None:
        labels.mixing = labels.flow.marked(node for node in labels.flow.order if _mixes(labels, node))
    return labels.mixing


def _mixes(labels: Labels, node: fx.Node) -> bool:
    flow, name = labels.flow, op_name(node)
    linear = flow.linears.get(node) or flow.depthwise.get(node)
    if linear is not None:
        return linear.mixes or (linear.axes == (-1,) and _along_positions(labels, linear.input))
    if node in flow.convolutions:
        return True
    if node in flow.attentions or node in flow.scores or not labels.columns.front.get(node):
        return False
    value = node.meta.get("val")
    if isinstance(value, Tensor) and not (value.is_floating_point() or value.is_complex()):
        return False
    if name in PADDING:
        pads = node.args[1]
        return isinstance(pads, list | tuple) and any(not isinstance(p, int) or p < 0 for p in pads[2:])
    if name in _SUMMING:
        return _pools_positions(labels, node)
    return node in flow.products or name in RUNNING or (name in RESIZING and "pool" in name)


def _sums(labels: Labels, node: fx.Node) -> bool:
    return node in labels.flow.products or op_name(node) in _SUMMING


def _pools_positions(labels: Labels, node: fx.Node) -> bool:
    """Return whether columns are the same along a pooled axis, so that the axis does not count columns."""
    value = node.args[0]
    index = labels.columns.index(value) if isinstance(value, fx.Node) else None
    if index is None or len(node.args) < 2:
        return False
    dims = node.args[1] if isinstance(node.args[1], list | tuple) else [node.args[1]]
    axes = {d % index.dim() for d in dims if isinstance(d, int)} - set(labels.columns.once(varying, index))
    return bool(axes)


def _along_positions(labels: Labels, value: fx.Node) -> bool:
    """Return whether the last axis of a value counts positions: its columns differ, but not along that axis."""
    index = labels.columns.index(value)
    if not isinstance(index, Tensor) or index.shape[-1] < 2:
        return False
    axes = labels.columns.once(varying, index)
    return bool(axes) and index.dim() - 1 not in axes
