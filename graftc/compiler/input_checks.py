"""What a model asks of the values of its inputs, and a graph of its outputs does not show, as graphs of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from graftc.passes.core.ir.cleaning import takes_device
from graftc.passes.core.ir.program import InputCheck, OutputSpec, Program, above
from graftc.passes.core.weights.store import Store
from graftc.specs.errors.diagnostics import GraftError

aten = torch.ops.aten

_LARGEST = 100
"""Operators of a check at most: one that reads hidden states is as large as the model."""


def require(checks: Iterable[InputCheck], present: Mapping[str, Any], store: Store) -> None:
    """Check a call; a condition that lacks an input is passed over.

    Args:
        checks: of the graph that is to run.
        present: what it is called with, by name.
        store: its tensors.

    Raises:
        GraftError: GC145 for the first that does not hold.
    """
    for check in checks:
        known = all(name in present for name in check.program.signature)
        if known and not bool(_value(check.program.graph, present, store.get, store.device()).all()):
            raise GraftError("GC145", check.message, hint="the source model refuses this call as well")


@torch.no_grad()
def _value(
    graph: fx.Graph, present: Mapping[str, Any], tensor: Callable[[str], Tensor], device: torch.device
) -> Tensor:
    values: dict[fx.Node, Any] = {}
    for node in graph.nodes:
        if node.op == "output":
            return values[node.args[0][0]]  # type: ignore[no-any-return]
        if node.op == "placeholder":
            values[node] = present[str(node.target)]
        elif node.op == "get_attr":
            values[node] = tensor(str(node.target))
        else:
            args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), values.__getitem__)
            if takes_device(node.target):
                kwargs = {**kwargs, "device": device}
            values[node] = node.target(*args, **kwargs)
    raise AssertionError("a graph without an output")


def checks_of(program: Program, messages: list[str]) -> tuple[InputCheck, ...]:
    """The conditions on inputs that a captured graph asserts.

    Args:
        program: as it was captured, with its assertions.
        messages: what each is about, in order.
    """
    asserted = program.graph.find_nodes(op="call_function", target=aten._is_all_true.default)
    told = messages if len(messages) == len(asserted) else [""] * len(asserted)
    pairs = zip(asserted, told, strict=True)
    return tuple(found for node, text in pairs if (found := _check(program, node, text)) is not None)


def _check(program: Program, node: fx.Node, text: str) -> InputCheck | None:
    if not _is_asserted(node):
        return None
    condition = node.args[0]
    assert isinstance(condition, fx.Node)
    needed = {condition, *above([condition])}
    if len(needed) > _LARGEST or any(n.op == "get_attr" and n.meta["val"].is_floating_point() for n in needed):
        return None
    graph, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    for each in program.graph.nodes:
        if each in needed:
            copies[each] = graph.node_copy(each, copies.__getitem__)
    graph.output((copies[condition],))
    names = {str(each.target) for each in needed if each.op == "placeholder"}
    inputs = tuple(spec for spec in program.inputs if spec.name in names)
    about = f": {text}" if text else ""
    return InputCheck(Program(graph, inputs, OutputSpec("leaf")), f"the model does not take this call{about}")


def _is_asserted(node: fx.Node) -> bool:
    """Whether a value leads to an assertion and to nothing else."""
    pending, seen, asserted = list(node.users), set[fx.Node](), False
    while pending:
        user = pending.pop()
        if user in seen:
            continue
        seen.add(user)
        if user.target is aten._assert_scalar.default:
            asserted = True
        elif user.op == "output" or isinstance(user.meta.get("val"), Tensor):
            return False
        pending += user.users
    return asserted
