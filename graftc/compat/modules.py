"""Access to the tables in which modules store their tensors and children, and to the methods that run their calls.

The public methods of modules return copies, omit entries that are None, and run code of the module's class.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)

PARAMETERS, BUFFERS, CHILDREN = "_parameters", "_buffers", "_modules"
"""The names of the tables, for generated code, and for attributes of modules that are saved and restored."""

RUN_BY_CALLS = ("_call_impl", "_wrapped_call_impl")
"""Methods of a module that a call runs in addition to Python's and the module's own."""

STORED_VERSION = "_version"
"""The attribute of a module's class that identifies the format of its state dicts."""


def parameters_of(module: nn.Module) -> dict[str, nn.Parameter | None]:
    """Return the table of a module's own parameters; changes to it change the module."""
    return module._parameters


def buffers_of(module: nn.Module) -> dict[str, Tensor | None]:
    """Return the table of a module's own buffers; changes to it change the module."""
    return module._buffers


def children_of(module: nn.Module) -> dict[str, nn.Module | None]:
    """Return the table of a module's children; changes to it change the module."""
    return module._modules


def transient_of(module: nn.Module) -> set[str]:
    """Return the names of a module's non-persistent buffers; changes to the set change the module."""
    return module._non_persistent_buffers_set


def is_compiled(module: nn.Module) -> bool:
    """Return whether `torch.nn.Module.compile` has replaced the code of a module's calls."""
    return module._compiled_call_impl is not None


def printed_kind(module: nn.Module) -> str:
    """Return the class name in a module's printed form."""
    return str(module._get_name())  # type: ignore[no-untyped-call]


def printed_as(kind: Callable[[Any], str]) -> Callable[[type[M]], type[M]]:
    """Return a decorator that lets a module class choose the class name in its printed form."""

    def decorate(cls: type[M]) -> type[M]:
        cls._get_name = kind  # type: ignore[method-assign]
        return cls

    return decorate


def applied_by(
    apply: Callable[[Any, Callable[[Tensor], Tensor], Callable[[], Any]], Any],
) -> Callable[[type[M]], type[M]]:
    """Return a decorator for a module class that controls how its tensors are moved and cast.

    ``to``, ``half`` and similar methods all use one method, which has no public name.

    Args:
        apply: called with the module, the function that converts a tensor, and a function that converts all tensors.
    """

    def decorate(cls: type[M]) -> type[M]:
        def _apply(self: Any, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
            return apply(self, fn, lambda: super(cls, self)._apply(fn, recurse))

        cls._apply = _apply  # type: ignore[method-assign]
        return cls

    return decorate
