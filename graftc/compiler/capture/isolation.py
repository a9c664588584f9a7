"""Create graphs in one thread at a time and in torch's default state, regardless of the caller's state.

Autocast, grad mode, inference mode, the default dtype and device, and modes that intercept calls would become part of
the graph, but the graph is used under other states as well. torch.export stores its state in process-wide globals, and
a capture changes the model temporarily, so two simultaneous captures would interfere.
"""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from graftc.compat.hooks import global_hooks, none_left_behind
from graftc.compat.modes import no_function_modes, no_modes
from graftc.passes.core.weights.source_lock import source_lock


@contextmanager
def isolated() -> Iterator[None]:
    """Run the block with torch's state in this thread as in a new process; restore the caller's state afterwards.

    Autocast is off on every device, gradients are recorded, inference mode is off, the default dtype is float32 and the
    default device the CPU, and no mode intercepts functions or operators. Flags that only choose among kernels
    (deterministic algorithms, ``torch.backends``) and anomaly detection are unchanged.
    """
    with (
        no_function_modes(),
        no_modes(),
        _no_autocast(),
        torch.inference_mode(False),
        torch.enable_grad(),
        _default_dtype,
    ):
        yield


@contextmanager
def exclusive() -> Iterator[None]:
    """Run the block as in `isolated`, in one thread of the process at a time; re-entrant.

    Global module hooks, which operator counters and profilers use, run only for calls in other threads, if at all.
    """
    with source_lock(), isolated(), _no_global_hooks(), none_left_behind():
        yield


@contextmanager
def seldom_collected() -> Iterator[None]:
    """Collect garbage rarely, and only among new objects, while the block runs.

    A compilation creates many long-lived objects, and would spend about a quarter of its time scanning them, and the
    modules of torch and transformers, over and over.
    """
    before = gc.get_threshold()
    if before[0]:  # 0 means that collection is off
        gc.set_threshold(*map(max, before, _SELDOM))
    try:
        yield
    finally:
        gc.set_threshold(*before)


_SELDOM = (100_000, 50, 100)


def is_traced() -> bool:
    """Return whether a compiler is tracing what this thread does.

    ``torch.compiler.is_compiling()`` is also true if another thread of the process is in torch.export.
    """
    if torch.compiler.is_dynamo_compiling():
        return True
    return torch.compiler.is_compiling() and get_proxy_mode() is not None


class _OfOthers:
    """A global module hook that runs in all threads except one."""

    def __init__(self, hook: Any, thread: int) -> None:
        self._hook, self._thread = hook, thread

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return None if threading.get_ident() == self._thread else self._hook(*args, **kwargs)


@contextmanager
def _no_global_hooks() -> Iterator[None]:
    """Suspend global module hooks while the block runs: forward hooks in this thread, backward hooks in all threads.

    A backward hook changes the recorded operators by its mere presence.
    """
    tables = global_hooks()
    forward = (tables["global_forward_pre_hooks"], tables["global_forward_hooks"])
    backward = (tables["global_backward_pre_hooks"], tables["global_backward_hooks"])
    before: list[dict[int, Any]] = [dict(table) for table in (*forward, *backward)]
    for table in forward:
        table.update({number: _OfOthers(hook, threading.get_ident()) for number, hook in table.items()})
    for table in backward:
        table.clear()
    try:
        yield
    finally:
        for table, hooks in zip(forward, before[:2], strict=True):
            table.update({number: hook for number, hook in hooks.items() if number in table})
        for table, hooks in zip(backward, before[2:], strict=True):
            table.update(hooks)


def unheard(hook: Any) -> bool:
    """Return whether a global module hook is suspended while this thread creates a graph."""
    return isinstance(hook, _OfOthers)


@contextmanager
def _no_autocast() -> Iterator[None]:
    devices = [kind for kind in _device_types() if torch.is_autocast_enabled(kind)]
    for kind in devices:
        torch.set_autocast_enabled(kind, False)
    try:
        yield
    finally:
        for kind in devices:
            torch.set_autocast_enabled(kind, True)


def _device_types() -> list[str]:
    known = ("cpu", "cuda", "xpu", "mps", "mtia", "hpu", "xla", "ipu", "maia", torch.device("privateuseone").type)
    return [kind for kind in known if torch.amp.is_autocast_available(kind)]


class _DefaultDtype:
    """A context manager that makes float32 the default dtype while any thread is inside; it is set process-wide."""

    def __init__(self) -> None:
        self._count = 0
        self._before = torch.float32
        self._lock = threading.Lock()

    def renew(self) -> None:
        """Replace the lock with a new one, which is not held."""
        self._lock = threading.Lock()

    def __enter__(self) -> None:
        with self._lock:
            if self._count == 0:
                self._before = torch.get_default_dtype()
                torch.set_default_dtype(torch.float32)
            self._count += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._count -= 1
            if self._count == 0:
                torch.set_default_dtype(self._before)


_default_dtype = _DefaultDtype()

if hasattr(os, "register_at_fork"):  # a child process has only the thread that forked
    os.register_at_fork(after_in_child=_default_dtype.renew)
