"""Decisions: branches on tensor values in an element's Python code. A graph is valid for one sequence of decisions.

The graph returns the values on which its decisions are based, and its caller checks them: if they would have led to
different decisions, the results are discarded and another graph runs. This suits only decisions that rarely change (see
`varying`): those based on buffers, on masks, or on whether values are finite. A layer that branches on hidden states
cannot run as a graph.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.overrides import TorchFunctionMode

from graftc.passes.core.ir.program import Program, above, is_random

DECIDED = "decided"
"""The output with the values on which an element's decisions are based, ``bool[]`` each, in order."""


class Decisions(TorchFunctionMode):
    """A mode in which code that branches on tensors follows prescribed decisions, while the tensors are recorded.

    Args:
        taken: the prescribed decisions, in order; any further decisions follow the actual values.

    Attributes:
        by: the value on which each decision is based: ``bool[]``.
        taken: every decision, in order.
    """

    def __init__(self, taken: Iterable[bool] = ()) -> None:
        super().__init__()
        self._given = tuple(taken)
        self.by: list[Tensor] = []
        self.taken: list[bool] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if not _decides(func, args):
            return func(*args, **(kwargs or {}))
        number = len(self.taken)
        taken = self._given[number] if number < len(self._given) else bool(func(*args))
        self.by.append(args[0].detach().reshape(()) != 0)
        self.taken.append(taken)
        return taken


def _decides(func: Any, args: Sequence[Any]) -> bool:
    """Return whether a call converts a single-element tensor to a Python bool."""
    if func is Tensor.item and args[0].dtype != torch.bool:
        return False
    return func in _DECIDING and isinstance(args[0], Tensor) and args[0].numel() == 1


_DECIDING = (Tensor.__bool__, Tensor.item, Tensor.is_nonzero, torch.is_nonzero)


def varying(program: Program) -> bool:
    """Return whether a decision depends on random numbers, or on hidden states other than through their finiteness.

    Args:
        program: the Program of a union of elements.
    """
    by = [node for node in _decided(program) if isinstance(node, fx.Node)]
    stop = [node for node in above(by) if node.target in _FINITE]
    reached = [node for node in above(by, stop) if node not in stop]
    inputs = {spec.name: spec.dtype for spec in program.inputs}
    hidden = any(node.op == "placeholder" and inputs[str(node.target)].is_floating_point for node in reached)
    return hidden or any(map(is_random, reached))


_FINITE = (
    torch.ops.aten.isnan.default,
    torch.ops.aten.isinf.default,
    torch.ops.aten.isfinite.default,
)


def _decided(program: Program) -> list[Any]:
    """Return those outputs of a union's Program that are the values on which decisions are based."""
    (output,) = program.graph.find_nodes(op="output")
    results, values = list(output.args[0]), list[Any]()
    for outer in program.outputs.children:
        for name, child in zip(outer.fields, outer.children, strict=False):
            count = len(child.names)
            values += results[:count] if name == DECIDED else []
            results = results[count:]
        if not outer.fields:
            results = results[len(outer.names) :]
    return values
