"""Handle interrupts that stop part of the work instead of the whole command."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Stop:
    """A request to stop, set by the first interrupt; a second interrupt raises KeyboardInterrupt as usual."""

    def __init__(self) -> None:
        self.asked = False

    def __call__(self) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True


@contextmanager
def interrupts(act: Callable[[], None]) -> Iterator[None]:
    """Call ``act`` on an interrupt while the block runs. Interrupts that are ignored stay ignored."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, lambda *_: act())
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
