"""Make a graph's choices among its own values open to `graftc::route`, which records them or imposes others."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import fx

import graftc.passes.core.ops.route  # noqa: F401 (registers the operator)
from graftc.passes.core.ir.cleaning import remove_dead
from graftc.passes.core.ir.edits import Edits
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
"""Operators that choose among values by their size, and whether they give the values beside the numbers."""


def choices_of(program: Program) -> tuple[fx.Node, ...]:
    """The base's own nodes that choose among floating-point values by their size, in graph order: routers of experts,
    and whatever else goes on with the numbers of the largest. One of which only the values are read is none."""
    found = (node for node in program.graph.nodes if node.target in _GIVES_VALUES and provenance(node) is None)
    return tuple(node for node in found if _scores(node).meta["val"].is_floating_point() and _numbers(node))


def route_choices(program: Program) -> Program:
    """A copy in which each choice asks `graftc::route` which to take, by its node's name."""
    made = program.copy(entry="routes", edits=Edits(), baseline={})
    for node in choices_of(made):
        _ask(made.graph, node)
    remove_dead(made)
    return made


def _ask(graph: fx.Graph, node: fx.Node) -> None:
    pair = _GIVES_VALUES[node.target]
    val = node.meta["val"]
    meta = {"module": node.meta.get("module", "")}
    replaced = {user: user.args[1] for user in node.users} if pair else {node: 1}
    with graph.inserting_after(node):
        own = graph.call_function(operator.getitem, (node, 1)) if pair else node
    if pair:
        own.meta = {**meta, "val": val[1]}
    with graph.inserting_after(own):
        asked = graph.call_function(torch.ops.graftc.route.default, (_scores(node), own, _axis(node), node.name))
    asked.meta = {**meta, "val": val if pair else (val, val)}
    for user, at in replaced.items():
        with graph.inserting_after(asked):
            taken = graph.call_function(operator.getitem, (asked, at))
        taken.meta = {**meta, "val": asked.meta["val"][at]}
        user.replace_all_uses_with(taken, lambda reader: reader is not asked)


def _scores(node: fx.Node) -> fx.Node:
    scores = node.args[0]
    assert isinstance(scores, fx.Node)
    return scores


def _numbers(node: fx.Node) -> bool:
    """Whether something reads the numbers that a choice gives."""
    return not _GIVES_VALUES[node.target] or any(user.args[1] == 1 and user.users for user in node.users)


def _axis(node: fx.Node) -> int | None:
    """The axis that a choice is made along; None for all elements."""
    schema = node.target._schema.arguments  # type: ignore[union-attr]
    at, default = next((i, a.default_value) for i, a in enumerate(schema) if a.name == "dim")
    found = node.kwargs.get("dim", node.args[at] if len(node.args) > at else default)
    assert found is None or isinstance(found, int)
    return found
