"""What an element's Python decides by the values of tensors: a graph holds for decisions that are taken alike.

What each is taken by comes out of the graph beside the results, and whoever runs it compares: where a call decides
otherwise, its results are dropped and another graph runs. Only what hardly varies is decided so (`varying`): by the
values of buffers and masks, and by whether numbers are finite. A layer that decides by hidden states is no graph.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.overrides import TorchFunctionMode

from graftc.passes.core.ir.program import Program, above, is_random

DECIDED = "decided"
"""The name under which an element gives what its decisions were taken by, ``bool[]`` each, in order."""


class Decisions(TorchFunctionMode):
    """Inside, decisions by values are as given, and what they are taken by is kept.

    Args:
        taken: decisions, in order; each further one is taken by the value that is there.

    Attributes:
        by: what each was taken by: ``bool[]``.
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
    """Whether a call turns one element into a truth value."""
    if func is Tensor.item and args[0].dtype != torch.bool:
        return False
    return func in _DECIDING and isinstance(args[0], Tensor) and args[0].numel() == 1


_DECIDING = (Tensor.__bool__, Tensor.item, Tensor.is_nonzero, torch.is_nonzero)


def varying(program: Program) -> bool:
    """Whether a decision is taken by what varies from call to call: hidden states, other than by whether they are
    finite, and random numbers.

    Args:
        program: of a union of elements.
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
    """What comes out of a union's Program for decisions."""
    (output,) = program.graph.find_nodes(op="output")
    results, found = list(output.args[0]), list[Any]()
    for outer in program.outputs.children:
        for name, child in zip(outer.fields, outer.children, strict=False):
            count = len(child.names)
            found += results[:count] if name == DECIDED else []
            results = results[count:]
        if not outer.fields:
            results = results[len(outer.names) :]
    return found
