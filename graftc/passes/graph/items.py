"""Replace numbers that a graph reads from a tensor built from sizes with the sizes themselves.

The tracer loses track of a size that is put into a tensor and read back (``torch.tensor(x.shape[1]).item()``).
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from graftc.passes.core.ir.inference import Inference
from graftc.passes.core.ir.new_nodes import insert_call
from graftc.passes.core.ir.program import Program, mutates, nodes_in
from graftc.passes.core.ir.shapes import expression

aten = torch.ops.aten
_SAME = (
    aten.detach.default,
    aten.detach_.default,
    aten.clone.default,
    aten.alias.default,
    aten.to.device,
    aten.to.dtype,
    aten.to.dtype_layout,
)
_COMPUTED: dict[Any, Callable[[Any, Any], Any]] = {
    aten.add.Tensor: operator.add,
    aten.sub.Tensor: operator.sub,
    aten.mul.Tensor: operator.mul,
    aten.rsub.Scalar: operator.sub,
}


def sizes_for_items(program: Program) -> None:
    """Replace, in place, numbers that are read from tensors built from sizes with the sizes.

    Types that depended on those numbers are inferred again.
    """
    replaced = False
    types = Inference(program)
    for node in program.graph.find_nodes(op="call_function", target=aten.item.default):
        number = _number(node, node.args[0], types)
        if number is not None:
            node.replace_all_uses_with(number)
            program.graph.erase_node(node)
            replaced = True
    for node in program.graph.nodes if replaced else ():
        if node.op == "call_function" and _is_unknown(node.meta.get("val")):
            node.meta["val"] = types.call(node.target, node.args, node.kwargs)


def _number(item: fx.Node, source: Any, types: Inference) -> Any:
    """Return the value of a scalar integer tensor, as a size or a number; None if the value is not known."""
    if not isinstance(source, fx.Node):
        return source if type(source) is int else None
    value = source.meta.get("val")
    if isinstance(value, torch.SymInt):
        return source
    if not isinstance(value, torch.Tensor) or value.dim() > 0 or value.dtype != torch.int64:
        return None
    if any(mutates(user) and user.target not in _SAME for user in source.users):
        return None
    if source.target is aten.scalar_tensor.default or source.target in _SAME:
        return _number(item, source.args[0], types)
    compute = _COMPUTED.get(source.target)
    if compute is None or len(source.args) != 2 or source.kwargs:
        return None
    first, second = (_number(item, argument, types) for argument in source.args)
    if first is None or second is None:
        return None
    arguments = (second, first) if source.target is aten.rsub.Scalar else (first, second)
    if not list(nodes_in(arguments)):
        return compute(*arguments)
    return insert_call(item, compute, arguments, {**item.meta, "val": types.call(compute, arguments, {})})


def _is_unknown(value: Any) -> bool:
    values = value if isinstance(value, list | tuple) else [value]
    sizes = [s for v in values for s in (v.shape if isinstance(v, torch.Tensor) else [v])]
    return any(isinstance(s, torch.SymInt) and free_unbacked_symbols(expression(s)) for s in sizes)
