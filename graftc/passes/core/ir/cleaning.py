"""Helpers for passes that clean up graphs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import fx

from graftc.compat.operators import schema_of
from graftc.passes.core.ir.program import Program, above, mutates


def remove_dead(program: Program) -> None:
    """Erase unused calls without side effects, and unused tensors; keep inputs and nodes replaced by edits.

    An edit whose replacement is unused has no effect, and is removed as well.
    """
    while True:
        replaced = {edit.before for edit in program.edits}
        erased = set[fx.Node]()
        for node in reversed(list(program.graph.nodes)):
            unused = not node.users and node not in replaced
            if unused and node.op in ("call_function", "get_attr") and not mutates(node):
                program.graph.erase_node(node)
                erased.add(node)
        if not any(edit.after in erased for edit in program.edits):
            return
        program.edits = program.edits.within(set(program.graph.nodes))


def live(program: Program) -> set[fx.Node]:
    """Return the inputs, and the nodes that outputs or in-place changes depend on.

    A node that an edit has replaced is not included if it has no readers left.
    """
    return set(above(n for n in program.graph.nodes if n.op in ("placeholder", "output") or mutates(n)))


def on_device(
    target: Any, args: Sequence[Any], kwargs: Mapping[str, Any], device: torch.device | None
) -> tuple[Sequence[Any], Mapping[str, Any]]:
    """Return arguments that make an operator create its tensor on ``device`` rather than on the device that they name.

    Args:
        target: the operator; if it does not create a tensor, its arguments are returned unchanged.
        args, kwargs: the arguments.
        device: the device; None to leave the arguments unchanged.
    """
    if device is None or not takes_device(target):
        return args, kwargs
    place = _device_place(target)
    if place is not None and place < len(args):
        return (*args[:place], device, *args[place + 1 :]), kwargs
    return args, {**kwargs, "device": device}


def takes_device(target: Any) -> bool:
    """Return whether an operator creates a tensor on a device named by a ``device`` argument."""
    return isinstance(target, torch._ops.OpOverload) and _device_place(target) is not None


@cache
def _device_place(target: Any) -> int | None:
    """Return the position of an operator's ``device`` argument, or None if it has no such argument."""
    names = [argument.name for argument in schema_of(target).arguments]
    return names.index("device") if "device" in names else None
