"""Modes, which intercept torch's operators and functions, and their suspension in one thread.

torch has a stack of modes for each thread, and one for the whole process, for modes that trace before autograd. Code
that suspends modes, such as code that prints a tensor, also removes the modes of another thread in the middle of a
trace, which then fails with "pop empty mode stack". A thread that suspends modes therefore gets its own stack, which is
initially empty.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import _ops, overrides
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    _disable_current_modes,
    _get_current_dispatch_mode_stack,
)

__all__ = ["TorchDispatchMode", "modes_in_force", "no_function_modes", "no_modes"]

_operators: Any = _ops


class _Stacks:
    """Replacement for the process's stack, which is shared by all threads except those that have their own."""

    def __init__(self, shared: Any) -> None:
        self.shared, self.own = shared, threading.local()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.here, name)

    @property
    def here(self) -> Any:
        """The stack of this thread."""
        return getattr(self.own, "stack", self.shared)

    @property
    def _schema_check_mode(self) -> Any:
        return self.here._schema_check_mode

    @_schema_check_mode.setter
    def _schema_check_mode(self, mode: Any) -> None:
        self.here._schema_check_mode = mode

    @contextmanager
    def separate(self) -> Iterator[None]:
        """Use a new stack in this thread while the block runs."""
        before = self.here
        self.own.stack = _operators._ModeStackStateForPreDispatch()
        try:
            yield
        finally:
            self.own.stack = before


_stacks = _Stacks(_operators._mode_stack_state_for_pre_dispatch)
_operators._mode_stack_state_for_pre_dispatch = _stacks


@contextmanager
def no_modes() -> Iterator[None]:
    """Run the block without modes that intercept this thread's operators, without disturbing other threads' traces."""
    if torch._C._dispatch_tls_is_dispatch_key_included(torch._C.DispatchKey.PreDispatch):
        with _disable_current_modes(), _stacks.separate():  # this thread itself is in the middle of a trace
            yield
    else:
        with _stacks.separate(), _disable_current_modes():
            yield


@contextmanager
def no_function_modes() -> Iterator[None]:
    """Suspend this thread's function modes while the block runs; the default device is such a mode as well.

    Public functions can only bypass the innermost mode.
    """
    functions: Any = overrides
    modes = [functions._pop_mode() for _ in range(torch._C._len_torch_function_stack())]
    try:
        yield
    finally:
        for mode in reversed(modes):
            functions._push_mode(mode)


def modes_in_force() -> list[Any]:
    """Return this thread's modes, function modes first; torch has no public list of them."""
    functions: Any = overrides
    return [*functions._get_current_function_mode_stack(), *_get_current_dispatch_mode_stack()]
