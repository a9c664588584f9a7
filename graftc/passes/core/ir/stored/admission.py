"""Check whether a Program from a file may be used, as far as this can be determined without a model.

The interface must be consistent, no value may be larger than the Program's tensors justify, every operator must accept
its arguments and return the declared shapes and dtypes, and all in-place writes must be allowed.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, fx

from graftc.compat.operators import schema_of
from graftc.passes.core.ir.effects import flaw
from graftc.passes.core.ir.program import Program
from graftc.passes.core.ir.verify import SIZE_CHOICES, check_types

NODES = 200_000
"""The maximum number of nodes in a graph."""

ELEMENTS = 2**28
"""The number of elements that a value may have in excess of four times the number in the largest tensor that the graph
reads, at the sizes of the capture."""

PARTS = 2**16
"""The maximum number of tensors that one call returns."""

aten = torch.ops.aten


def admit(program: Program) -> str | None:
    """Check a Program on its own, and return a message about the first problem, or None if there is none."""
    problem = _interface(program) or _sizes(program)
    if problem is not None:
        return problem
    write = flaw(program.graph, program.mode, program.updates.__contains__)
    if write is not None:
        return f"{write[0].name}: {write[1]}"
    for choice in SIZE_CHOICES:
        node, message = check_types(program, choice, strict=True) or (None, None)
        if node is not None:
            return f"{node.name}: {message}"
    return None


def _interface(program: Program) -> str | None:
    nodes = list(program.graph.nodes)
    first = program.placeholders()
    if len(nodes) > NODES:
        return f"it has more than {NODES} nodes"
    calls = [node.op for node in nodes if node.op in ("placeholder", "call_function")]
    if not nodes or nodes[-1].op != "output" or "placeholder" in calls[len(first) :]:
        return "its inputs must come first and its outputs last"
    if len(set(program.signature)) != len(program.signature) or tuple(n.target for n in first) != program.signature:
        return "its inputs do not match its signature"
    defaults = [bool(node.args) for node in first]
    if sorted(defaults) != defaults:
        return "an optional input comes before a required one"
    for node, spec in zip(first, program.inputs, strict=True):
        value = node.meta["val"]
        if not isinstance(value, Tensor) or value.dtype != spec.dtype or value.dim() != len(spec.shape):
            return f"the input {spec.name} does not have the dtype and rank of its signature"
    if len(nodes[-1].args[0]) != len(program.outputs.names):
        return "its number of outputs does not match the number of output names"
    return None


def _sizes(program: Program) -> str | None:
    read = program.graph.find_nodes(op="get_attr")
    for node in read:
        value = node.meta["val"]
        if not isinstance(value, Tensor) or any(isinstance(size, torch.SymInt) for size in value.shape):
            return f"{node.target} is not a tensor of fixed shape"
    most = ELEMENTS + 4 * max((node.meta["val"].numel() for node in read), default=0)
    for node in program.graph.nodes:
        value = node.meta["val"]
        values = value if isinstance(value, list) else [value]
        if len(values) > PARTS or (node.op == "call_function" and _parts(node) > PARTS):
            return f"{node.name} returns more than {PARTS} tensors"
        if any(isinstance(v, Tensor) and math.prod(map(_number, v.shape)) > most for v in values):
            return f"{node.name} has more than {most} elements"
    return None


def _number(size: Any) -> int:
    number: Any = size.node.hint if isinstance(size, torch.SymInt) else size
    return int(number)


def _parts(node: fx.Node) -> int:
    """Return an upper bound on the number of tensors that a call returns, computed without making the call."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or not any(
        "List" in str(r.type) for r in schema_of(target).returns
    ):
        return 1
    source = node.args[0] if node.args else None
    value = source.meta["val"] if isinstance(source, fx.Node) else None
    longest = max((_number(size) for size in value.shape), default=1) if isinstance(value, Tensor) else 1
    literals = [abs(a) for a in node.args[1:] if type(a) is int]
    if target in (aten.unbind.int, aten.split.Tensor):
        return longest if target is aten.unbind.int else -(-longest // max(1, literals[0] if literals else 1))
    return max([len(node.all_input_nodes), *literals])
