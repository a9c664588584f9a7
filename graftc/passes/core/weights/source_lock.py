"""One lock for whoever changes a source model for a while, as a capture does, and whoever reads its tensors.

A model that is being traced has fake tensors in its tables, or nothing at all, and other forwards. Another thread that
saves, merges or exports meanwhile must not see that: its file would lack layers, and say that this is the base.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["source_lock"]

_lock = threading.RLock()


def _renew() -> None:
    """A child process has only the thread that forked: nobody there would ever release the lock."""
    global _lock
    _lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew)


@contextmanager
def source_lock() -> Iterator[None]:
    """Inside, no other thread captures a model or reads the tables of one; re-entrant."""
    with _lock:
        yield
