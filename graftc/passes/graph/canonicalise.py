"""Canonicalise a captured graph, so that equal models print and hash identically and roles can be recognised.

Nodes left behind by capture that have no effect are removed: metadata assertions, casts of integers to their own dtype,
full slices, ``+ 0``, ``* 1.0``, expansions to the same shape, copies of constants, empty operands of concatenations,
dropout that never drops, and unused pure computations. Literal devices are removed as well: a Program runs where its
Store is, and lowering restores the device.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from graftc.compat.operators import ASSERT_TENSOR_METADATA, TO_COPY, schema_of
from graftc.passes.core.ir.cleaning import remove_dead
from graftc.passes.core.ir.effects import Memory
from graftc.passes.core.ir.inference import Inference
from graftc.passes.core.ir.new_nodes import insert_call
from graftc.passes.core.ir.program import Program
from graftc.passes.core.ir.shapes import expression, same_type
from graftc.passes.core.worklist import Worklist
from graftc.passes.graph.items import sizes_for_items

aten = torch.ops.aten
_END = 2**63 - 1

Rule = Callable[[fx.Node], "fx.Node | None"]
"""A rule returns the node that replaces the given one, or None if it does not apply."""


def canonicalise(program: Program) -> Program:
    """Canonicalise in place and return the Program."""
    sizes_for_items(program)
    graph, types = program.graph, Inference(program)
    for node in list(graph.nodes):
        _functional(node, types)
    memory = Memory(graph)  # tracks the remaining writes
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        if node.target is ASSERT_TENSOR_METADATA:
            graph.erase_node(node)
            continue
        _functional(node, types)
        _drop_device(node)
        _trim_defaults(node)
        rule = RULES.get(node.target)
        replacement = rule(node) if rule is not None else None
        if replacement is not None and not _is_written_apart(node, replacement, memory):
            node.replace_all_uses_with(replacement)
            graph.erase_node(node)
    _share_sizes(program)
    remove_dead(program)
    return program


def _is_written_apart(node: fx.Node, source: fx.Node, memory: Memory) -> bool:
    """Return whether a value is a copy of another and one of the two is later changed in place."""
    return memory.roots(node).isdisjoint(memory.roots(source)) and not memory.settled(node, source)


def _value(node: Any) -> Any:
    return node.meta.get("val") if isinstance(node, fx.Node) else None


def _is_number(value: Any, number: float) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value == number


def _pass_through(node: fx.Node) -> fx.Node | None:
    source = node.args[0]
    return source if isinstance(source, fx.Node) and same_type(_value(node), _value(source)) else None


def _depends_on_input(node: fx.Node) -> bool:
    nodes = Worklist([node])
    for current in nodes:
        if current.op == "placeholder":
            return True
        nodes += current.all_input_nodes
    return False


def _constant_copy(node: fx.Node) -> fx.Node | None:
    """Drop copies and detachments of constants: there is no gradient to stop, and nothing writes to the copy."""
    source = node.args[0]
    if not isinstance(source, fx.Node) or _depends_on_input(source):
        return None
    trains = source.op == "get_attr" and isinstance(_value(source), torch.nn.Parameter)
    return None if trains else source


def _slice(node: fx.Node) -> fx.Node | None:
    _, _, start, end, step = _padded(node.args, (None, 0, None, None, 1))
    full = start in (None, 0) and (end is None or end == _END) and step == 1
    return _pass_through(node) if full else None


def _add(node: fx.Node) -> fx.Node | None:
    plain = not node.kwargs and len(node.args) == 2 and _is_number(node.args[1], 0)
    return _pass_through(node) if plain else None


def _mul(node: fx.Node) -> fx.Node | None:
    return _pass_through(node) if _is_number(node.args[1], 1) else None


def _cat(node: fx.Node) -> fx.Node | None:
    operands, dim = _padded(node.args, (None, 0))
    kept = [x for x in operands if not (isinstance(_value(x), torch.Tensor) and tuple(_value(x).shape) == (0,))]
    if len(kept) == 1:
        return kept[0] if isinstance(kept[0], fx.Node) else None
    if len(kept) < len(operands):
        node.args = (kept, dim)
    return None


def _dropout(node: fx.Node) -> fx.Node | None:
    source, p, train = node.args
    return source if isinstance(source, fx.Node) and (train is False or _is_number(p, 0)) else None


def _to(node: fx.Node) -> fx.Node | None:
    """Drop a cast that changes nothing, and the device, layout and copy arguments of other casts.

    Casts of floating-point values stay: under autocast, the value may have a different dtype.
    """
    source = node.args[0]
    if not isinstance(source, fx.Node):
        return None
    if same_type(_value(node), _value(source)) and not _value(node).is_floating_point():
        return source
    node.target = aten.to.dtype
    node.args = (source, _value(node).dtype)
    node.kwargs = {}
    return None


def _padded(args: tuple[Any, ...], defaults: tuple[Any, ...]) -> tuple[Any, ...]:
    return (*args, *defaults[len(args) :])


def _functional(node: fx.Node, types: Inference) -> None:
    """Replace an in-place call on a value that nothing else reads by the functional call, cast to the value's dtype."""
    target = node.target
    if not (isinstance(target, torch._ops.OpOverload) and schema_of(target).is_mutable):
        return
    _, name, overload_name = str(target).split(".")
    source = node.args[0] if node.args else None
    functional = getattr(aten, name.removesuffix("_"), None)
    overload = getattr(functional, overload_name, None) if name.endswith("_") else None
    if overload is None or not isinstance(source, fx.Node) or source.op != "call_function":
        return
    if set(source.users) != {node} or _is_view(source):
        return
    node.target = overload
    value, inferred = _value(node), types.call(overload, node.args, node.kwargs)
    if inferred.dtype == value.dtype:
        return
    cast = insert_call(node, aten.to.dtype, (node, value.dtype), node.meta, after=True)
    node.replace_all_uses_with(cast, delete_user_cb=lambda user: user is not cast)
    node.meta["val"] = inferred


def _is_view(node: fx.Node) -> bool:
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return True
    return any(argument.alias_info is not None for argument in schema_of(target).arguments)


def _drop_device(node: fx.Node) -> None:
    if node.kwargs.keys() & {"device", "pin_memory", "layout"}:
        node.kwargs = {k: v for k, v in node.kwargs.items() if k not in ("device", "pin_memory", "layout")}


def _trim_defaults(node: fx.Node) -> None:
    """Omit trailing and keyword arguments that equal the schema's defaults, so that equal calls are written alike."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return
    arguments = schema_of(target).arguments
    args = list(node.args)
    while args and len(args) <= len(arguments):
        argument = arguments[len(args) - 1]
        last = args[-1]
        if not argument.has_default_value() or isinstance(last, fx.Node | list | tuple):
            break
        if type(last) is not type(argument.default_value) or last != argument.default_value:
            break
        args.pop()
    defaults = {a.name: a.default_value for a in arguments if a.has_default_value()}
    kwargs = {
        k: v
        for k, v in node.kwargs.items()
        if isinstance(v, fx.Node | list | tuple) or k not in defaults or v != defaults[k]
    }
    node.args, node.kwargs = tuple(args), kwargs


def _share_sizes(program: Program) -> None:
    """Keep one node for each symbolic size: that of the first input that has the symbol."""
    graph = program.graph
    owners: dict[Any, tuple[fx.Node, int]] = {}
    for node in program.placeholders():
        value = _value(node)
        for dim, size in enumerate(value.shape if isinstance(value, torch.Tensor) else ()):
            expr = expression(size)
            if getattr(expr, "is_symbol", False):
                owners.setdefault(expr, (node, dim))
    shared: dict[Any, fx.Node] = {}
    after = program.placeholders()[-1] if owners else None
    for node in graph.find_nodes(op="call_function", target=aten.sym_size.int):
        expr = expression(_value(node))
        if expr not in owners or after is None:
            continue
        if expr not in shared:
            meta = {"val": _value(node), "module": ""}
            shared[expr] = insert_call(after, aten.sym_size.int, owners[expr], meta, after=True)
        node.replace_all_uses_with(shared[expr])
        graph.erase_node(node)
    for expr in owners:
        if expr in shared:
            assert after is not None
            after.append(shared[expr])
            after = shared[expr]


def _getitem(node: fx.Node) -> fx.Node | None:
    source, index = node.args
    if isinstance(source, fx.Node) and source.target in _CUTTING:
        return _rejoined(source, index)
    if isinstance(source, list | tuple) and isinstance(index, int):
        item = source[index]
        return item if isinstance(item, fx.Node) else None
    return None


_CUTTING = (aten.chunk.default, aten.split.Tensor, aten.split_with_sizes.default)


def _rejoined(cut: fx.Node, index: Any) -> fx.Node | None:
    """Return one of several parts that were concatenated and then cut at the same places; None for other cuts."""
    whole = cut.args[0]
    if not (isinstance(whole, fx.Node) and whole.target is aten.cat.default and isinstance(index, int)):
        return None
    (operands, dim), (_, _, cut_dim) = _padded(whole.args, (None, 0)), _padded(cut.args, (None, None, 0))
    parts = _value(cut)
    if dim != cut_dim or len(parts) != len(operands):
        return None
    same = all(
        list(map(expression, a.shape)) == list(map(expression, _value(b).shape))
        for a, b in zip(parts, operands, strict=True)
    )
    return operands[index] if same else None


RULES: dict[Any, Rule] = {
    aten.to.dtype: _to,
    aten.to.device: _to,
    aten.to.dtype_layout: _to,
    aten.to.other: _to,
    TO_COPY: _to,
    aten.lift_fresh_copy.default: _constant_copy,
    aten.detach_.default: _constant_copy,
    aten.detach.default: _constant_copy,
    aten.alias.default: _pass_through,
    aten.slice.Tensor: _slice,
    aten.expand.default: _pass_through,
    aten.view.default: _pass_through,
    aten.reshape.default: _pass_through,
    aten.add.Tensor: _add,
    aten.sub.Tensor: _add,
    aten.mul.Tensor: _mul,
    aten.div.Tensor: _mul,
    aten.cat.default: _cat,
    aten.dropout.default: _dropout,
    operator.getitem: _getitem,
}
