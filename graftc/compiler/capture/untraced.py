"""Detect the parts of a model that a graph does not preserve: custom backward passes, and checks of torch's state.

A graph contains the operators that a forward pass ran, with torch's gradients. A ``forward`` with a custom backward
pass, or one that checks whether gradients are enabled, becomes a different function in the graph, and its outputs on
samples need not show the difference. Only user code is inspected: ``forward``, and the functions that it mentions by
name, recursively. Libraries are trusted.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import nn

from graftc.compat.hooks import BACKWARD
from graftc.compiler.capture.identity.sources import home_of, names_of

_STATES = {
    "is_grad_enabled": "whether gradients are enabled",
    "is_inference_mode_enabled": "whether inference mode is on",
    "is_inference": "whether a tensor was created in inference mode",
    "is_autocast_enabled": "whether autocast is on",
    "is_contiguous": "the memory layout of an input",
    "requires_grad": "whether a tensor requires a gradient",
}


def unkept(model: nn.Module) -> list[str]:
    """Return notes on what a model's graphs leave out, without duplicates."""
    notes: dict[str, None] = {}
    classes: set[type] = set()
    for path, module in model.named_modules():
        if any(vars(module)[table] for table in BACKWARD):
            notes[f"a hook on the backward pass of {path or 'the model'}"] = None
        own = vars(module).get("forward")
        if type(module) not in classes or own is not None:
            classes.add(type(module))
            notes |= dict.fromkeys(_of_code(type(module), own))
    return list(notes)


def _of_code(cls: type, own: Any) -> Iterator[str]:
    """Yield notes on what a graph cannot preserve of a class's ``forward``, or of an instance's replacement for it."""
    pending = [function for function in (_function(own), _function(getattr(cls, "forward", None))) if function]
    seen: set[int] = set()
    while pending:
        function = pending.pop()
        if id(function) in seen or home_of(function) != "user":
            continue
        seen.add(id(function))
        where = f"{function.__module__}.{function.__qualname__}"
        for name in names_of(function.__code__):
            if name in _STATES:
                yield f"{where} checks {_STATES[name]}"
            if name == "register_hook":
                yield f"{where} registers hooks on gradients"
            value = function.__globals__.get(name)
            if isinstance(value, type) and issubclass(value, torch.autograd.Function):
                yield f"{where} has a custom backward pass, {value.__name__}"
            called = (_function(value), _function(getattr(cls, name, None)))
            pending += [function for function in called if function is not None]


def _function(value: Any) -> FunctionType | None:
    while isinstance(value, MethodType):
        value = value.__func__
    return value if isinstance(value, FunctionType) else None
