"""Input checks: conditions that a model asserts about the values of its inputs, each expressed as a small Program."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from graftc.compat.operators import ASSERT_SCALAR, IS_ALL_TRUE
from graftc.passes.core.build.base_activations import computed
from graftc.passes.core.ir.program import InputCheck, OutputSpec, Program, above, is_random
from graftc.passes.core.weights.store import Store
from graftc.specs.errors.diagnostics import GraftError

aten = torch.ops.aten

_LARGEST = 100
"""The maximum number of nodes in a check: a check that reads hidden states would be as large as the model."""


def require(checks: Iterable[InputCheck], present: Mapping[str, Any], store: Store) -> None:
    """Check a call's inputs; a condition is skipped if one of its inputs is absent.

    Args:
        checks: the checks of the graph that will run.
        present: the inputs of the call, by name.
        store: the Store of the graph's tensors.

    Raises:
        GraftError: GC145 for the first condition that does not hold.
    """
    for check in checks:
        if any(name not in present for name in check.program.signature):
            continue
        (condition,) = check.program.output_node.all_input_nodes
        (value,) = computed([condition], lambda node: present[str(node.target)], store.get, store.device())
        if not bool(value.all()):
            raise GraftError("GC145", check.message, hint="the source model also rejects this call")


def checks_of(program: Program, messages: list[str]) -> tuple[InputCheck, ...]:
    """Return the conditions on inputs that a captured graph asserts.

    Args:
        program: the graph as captured, with its assertions.
        messages: a description of each assertion, in order.
    """
    asserted = program.graph.find_nodes(op="call_function", target=IS_ALL_TRUE)
    texts = messages if len(messages) == len(asserted) else [""] * len(asserted)
    pairs = zip(asserted, texts, strict=True)
    return tuple(check for node, text in pairs if (check := _check(program, node, text)) is not None)


def _check(program: Program, node: fx.Node, text: str) -> InputCheck | None:
    if not _is_asserted(node):
        return None
    condition = node.args[0]
    assert isinstance(condition, fx.Node)
    needed = set(above([condition]))
    if len(needed) > _LARGEST or any(map(_of_more_than_inputs, needed)):
        return None
    graph, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    for each in program.graph.nodes:
        if each in needed:
            copies[each] = graph.node_copy(each, copies.__getitem__)
    graph.output((copies[condition],))
    names = {str(each.target) for each in needed if each.op == "placeholder"}
    inputs = tuple(spec for spec in program.inputs if spec.name in names)
    about = f": {text}" if text else ""
    return InputCheck(Program(graph, inputs, OutputSpec("leaf")), f"the model does not accept this call{about}")


def _of_more_than_inputs(node: fx.Node) -> bool:
    """Return whether a value is a weight, or is drawn at random, so that a check would draw a different one."""
    return is_random(node) or (node.op == "get_attr" and node.meta["val"].is_floating_point())


def _is_asserted(node: fx.Node) -> bool:
    """Return whether a value leads to an assertion and to nothing else."""
    pending, seen, asserted = list(node.users), set[fx.Node](), False
    while pending:
        user = pending.pop()
        if user in seen:
            continue
        seen.add(user)
        if user.target is ASSERT_SCALAR:
            asserted = True
        elif user.op == "output" or isinstance(user.meta.get("val"), Tensor):
            return False
        pending += user.users
    return asserted
