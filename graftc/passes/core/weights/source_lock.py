"""A lock shared by code that temporarily changes a source model, such as a capture, and code that reads its tensors.

While a model is being traced, its parameter tables contain fake tensors or are empty, and its ``forward`` methods are
replaced. If another thread saved, merged or exported the model at that time, the files would silently lack layers.
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
    """Hold the re-entrant lock, so that no other thread captures a model or reads a model's tensors."""
    with _lock:
        yield
