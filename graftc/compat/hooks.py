"""Access to the hooks of a module, of all modules in the process, and of an optimiser.

torch lets code register hooks, but has no public way to list them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch.nn.modules.module as torch_module
from torch import nn

FORWARD = ("_forward_hooks", "_forward_pre_hooks")
"""A module's tables of the hooks that its forward pass calls."""

BACKWARD = ("_backward_hooks", "_backward_pre_hooks")
"""A module's tables of the hooks that its backward pass calls."""

CALL_HOOKS = (
    *FORWARD,
    *("_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks_with_kwargs"),
    *BACKWARD,
)
"""All tables that affect a call of a module."""


def forward_hooks(module: nn.Module) -> dict[int, Any]:
    """Return the hooks that run before and after a module's forward, by their ids."""
    return {**module._forward_pre_hooks, **module._forward_hooks}


def backward_hooks(module: nn.Module) -> dict[int, Any]:
    """Return the hooks that run in a module's backward pass, by their ids."""
    return {**module._backward_pre_hooks, **module._backward_hooks}


def hooks_before(module: nn.Module) -> list[tuple[Any, bool]]:
    """Return the hooks that run before a module's forward, global ones first, and whether each accepts keywords."""
    hooks = {**torch_module._global_forward_pre_hooks, **module._forward_pre_hooks}
    return [(hook, number in module._forward_pre_hooks_with_kwargs) for number, hook in hooks.items()]


def hooks_after(module: nn.Module) -> list[tuple[Any, bool]]:
    """Return the hooks that run after a module's forward, global ones first, and whether each accepts keywords."""
    hooks = {**torch_module._global_forward_hooks, **module._forward_hooks}
    return [(hook, number in module._forward_hooks_with_kwargs) for number, hook in hooks.items()]


def without_hooks(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """Return the attributes of a module that are tables of hooks, each replaced with an empty table."""
    names = [name for name in attributes if name.endswith("_hooks") or "_hooks_" in name]
    return {name: type(attributes[name])() for name in names if isinstance(attributes[name], dict)}


def global_hooks() -> dict[str, dict[int, Any]]:
    """Return the tables of global hooks, which apply to all modules, by names such as ``global_forward_hooks``."""
    tables = vars(torch_module).items()
    return {name.strip("_"): table for name, table in tables if name.startswith("_global_") and name.endswith("_hooks")}


@contextmanager
def none_left_behind() -> Iterator[None]:
    """Remove the hooks on all modules that torch 2.11 leaves behind when an export in the block fails."""
    registered = global_hooks()["global_buffer_registration_hooks"]
    known = set(registered)
    try:
        yield
    finally:
        for number in registered.keys() - known:
            if str(getattr(registered[number], "__module__", "")).startswith("torch._functorch."):
                del registered[number]


def has_global_hooks() -> bool:
    """Return whether any global hooks are registered."""
    return bool(torch_module._has_any_global_hook())  # type: ignore[no-untyped-call]


def has_step_hooks(optimizer: Any) -> bool:
    """Return whether an optimiser has torch's tables of step hooks, which wrappers of torch's class may lack."""
    return hasattr(optimizer, "_optimizer_step_pre_hooks")
