"""Gather rows before row-wise computations.

A head over a vocabulary whose results are read at only a few positions in a text is then computed only there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from graftc.compat.operators import TO_COPY
from graftc.passes.core.ir.cleaning import remove_dead
from graftc.passes.core.ir.inference import Inference
from graftc.passes.core.ir.layers import layer_path
from graftc.passes.core.ir.program import Program
from graftc.passes.core.ir.shapes import expression

aten = torch.ops.aten

_ELEMENTWISE = frozenset(
    {
        aten.add.Tensor,
        aten.sub.Tensor,
        aten.mul.Tensor,
        aten.mul.Scalar,
        aten.div.Tensor,
        aten.div.Scalar,
        aten.pow.Tensor_Scalar,
        aten.neg.default,
        aten.rsqrt.default,
        aten.gelu.default,
        aten.relu.default,
        aten.silu.default,
        aten.sigmoid.default,
        aten.tanh.default,
        aten.to.dtype,
        TO_COPY,
        aten.type_as.default,
        aten.clone.default,
        aten.contiguous.default,
        aten.alias.default,
    }
)
_LAST_AXIS = frozenset({aten.mean.dim, aten.sum.dim_IntList})
_NORMS = frozenset({aten.layer_norm.default, aten.rms_norm.default})
_MAPS = frozenset({aten.linear.default, aten.matmul.default})


def gather_early(program: Program) -> Program:
    """Move gathers of rows in front of row-wise computations, in place, and return the Program.

    A gather is ``x[batch, sequence, width] -> [batch, places, width]``. It is not moved into the repeated layers, so
    that these stay identical.
    """
    for node in list(program.graph.nodes):
        places = _places(node)
        if places is not None:
            _move(program, node, places)
    remove_dead(program)
    return program


def _places(node: fx.Node) -> fx.Node | None:
    """Return the places, ``[batch, places]``, from which a node gathers whole rows; None for other nodes."""
    if node.target is not aten.gather.default or node.args[1] != 1:
        return None
    source, index = node.args[0], node.args[2]
    assert isinstance(source, fx.Node)
    assert isinstance(index, fx.Node)
    if source.meta["val"].dim() != 3 or index.target is not aten.expand.default:
        return None
    column = index.args[0]
    assert isinstance(column, fx.Node)
    if column.target is not aten.unsqueeze.default or column.args[1] not in (-1, 2):
        return None
    places = column.args[0]
    return places if isinstance(places, fx.Node) else None


def _move(program: Program, gather: fx.Node, places: fx.Node) -> None:
    source = gather.args[0]
    assert isinstance(source, fx.Node)
    axes = first_axes(source.meta["val"])

    def has_rows(node: Any) -> bool:
        value = node.meta["val"] if isinstance(node, fx.Node) else None
        return isinstance(value, torch.Tensor) and value.dim() == 3 and first_axes(value) == axes

    inside, pending = dict[fx.Node, None](), [source]
    while pending:
        node = pending.pop()
        read = all(user is gather or user in inside for user in node.users)
        if node in inside or not read or not _of_each_row(node, has_rows) or layer_path(node.meta.get("module", "")):
            continue
        inside[node] = None
        pending += [each for each in node.all_input_nodes if has_rows(each)]
    if not inside or any(node < places for node in inside):
        return
    graph, types = program.graph, Inference(program)
    moved: dict[fx.Node, fx.Node] = {}

    def call(target: Any, *args: Any) -> fx.Node:
        created = graph.call_function(target, args)
        created.meta = {**gather.meta, "val": types.call(target, args, {})}
        return created

    for node in sorted(inside):
        for each in node.all_input_nodes:
            if has_rows(each) and each not in inside and each not in moved:
                with graph.inserting_before(node):
                    column = call(aten.unsqueeze.default, places, -1)
                    index = call(aten.expand.default, column, [-1, -1, each.meta["val"].shape[2]])
                    moved[each] = call(aten.gather.default, each, 1, index)
        for each in node.all_input_nodes:
            if each in moved:
                node.replace_input_with(each, moved[each])
        node.meta["val"] = types.call(node.target, node.args, node.kwargs)
    gather.replace_all_uses_with(source)
    graph.erase_node(gather)


def first_axes(value: torch.Tensor) -> tuple[Any, ...]:
    """Return the sizes of a value's first two axes as expressions, which can be compared."""
    return tuple(expression(size) for size in value.shape[:2])


def _of_each_row(node: fx.Node, has_rows: Callable[[Any], bool]) -> bool:
    """Return whether each row of a result depends only on the same row of the inputs, and on inputs without rows."""
    if node.op != "call_function" or not has_rows(node):
        return False
    others = [each for each in node.all_input_nodes if not has_rows(each)]
    first = node.args[0] if node.args else None
    if node.target in _ELEMENTWISE:
        values = [each.meta["val"] for each in others]
        return all(expression(n) == 1 for v in values if isinstance(v, torch.Tensor) for n in v.shape[:-1])
    if not has_rows(first):
        return False
    if node.target in _LAST_AXIS:
        return node.args[1] in ([-1], [2]) and len(node.args) > 2 and node.args[2] is True
    if node.target in _NORMS:
        return len(node.args[1]) == 1  # type: ignore[arg-type]
    return node.target in _MAPS and node.args[1] in others and node.args[1].meta["val"].dim() == 2  # type: ignore[union-attr]
