"""Route a graph's choices among its own values through `graftc::route`, which records or overrides them."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import fx

import graftc.passes.core.ops.route  # noqa: F401 (registers the operator)
from graftc.compat.operators import schema_of
from graftc.passes.core.ir.cleaning import remove_dead
from graftc.passes.core.ir.edits import Edits
from graftc.passes.core.ir.new_nodes import insert_call
from graftc.passes.core.ir.program import Program, provenance

aten = torch.ops.aten

_GIVES_VALUES: Mapping[Any, bool] = MappingProxyType(
    {
        aten.argmax.default: False,
        aten.argmin.default: False,
        aten.argsort.default: False,
        aten.argsort.stable: False,
        aten.max.dim: True,
        aten.min.dim: True,
        aten.sort.default: True,
        aten.sort.stable: True,
        aten.topk.default: True,
    }
)
"""Operators that choose among values by size, and whether they return the values as well as the indices."""


def choices_of(program: Program) -> tuple[fx.Node, ...]:
    """Return the base's own nodes that choose among floating-point values by size, in graph order.

    These are routers of experts, and any other such node whose indices are read. A choice does not count if only its
    values are read.
    """
    nodes = (node for node in program.graph.nodes if node.target in _GIVES_VALUES and provenance(node) is None)
    return tuple(node for node in nodes if _scores(node).meta["val"].is_floating_point() and _numbers(node))


def route_choices(program: Program) -> Program:
    """Return a copy in which `graftc::route` decides each choice, identified by the name of its node."""
    routed = program.copy(entry="routes", edits=Edits(), baseline={})
    for node in choices_of(routed):
        _route(node)
    remove_dead(routed)
    return routed


def _route(node: fx.Node) -> None:
    pair = _GIVES_VALUES[node.target]
    val = node.meta["val"]
    meta = {"module": node.meta.get("module", "")}
    replaced = {user: user.args[1] for user in node.users} if pair else {node: 1}
    own = insert_call(node, operator.getitem, (node, 1), {**meta, "val": val[1]}, after=True) if pair else node
    arguments = (_scores(node), own, _axis(node), node.name)
    both = {**meta, "val": val if pair else (val, val)}
    choice = insert_call(own, torch.ops.graftc.route.default, arguments, both, after=True)
    for user, at in replaced.items():
        taken = insert_call(choice, operator.getitem, (choice, at), {**meta, "val": both["val"][at]}, after=True)
        user.replace_all_uses_with(taken, lambda reader: reader is not choice)


def _scores(node: fx.Node) -> fx.Node:
    scores = node.args[0]
    assert isinstance(scores, fx.Node)
    return scores


def _numbers(node: fx.Node) -> bool:
    """Return whether the indices that a choice returns are read."""
    return not _GIVES_VALUES[node.target] or any(user.args[1] == 1 and user.users for user in node.users)


def _axis(node: fx.Node) -> int | None:
    """Return the axis along which a choice is made; None for all elements."""
    schema = schema_of(node.target).arguments  # type: ignore[arg-type]
    at, default = next((i, a.default_value) for i, a in enumerate(schema) if a.name == "dim")
    axis = node.kwargs.get("dim", node.args[at] if len(node.args) > at else default)
    assert axis is None or isinstance(axis, int)
    return axis
