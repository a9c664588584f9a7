"""A lock shared by code that changes a source model temporarily, such as a capture, and code that reads its tensors.

While a model is traced, its tables of parameters contain fake tensors or are empty, and its forwards are replaced. If
another thread saved, merged or exported the model then, layers would be missing from the files without an error.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_lock = threading.RLock()


def _renew() -> None:
    """Replace the lock in a forked child, where the thread that held it does not exist."""
    global _lock
    _lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew)


@contextmanager
def source_lock() -> Iterator[None]:
    """Hold the lock, so that no other thread captures a model or reads the tensors of one. It is re-entrant."""
    with _lock:
        yield
