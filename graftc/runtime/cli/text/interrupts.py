"""Interrupts that stop something other than the command."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["Stop", "interrupts"]


class Stop:
    """Asks work to stop at the first interrupt; at the second, work that does not is interrupted as any other."""

    def __init__(self) -> None:
        self.asked = False

    def __call__(self) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True


@contextmanager
def interrupts(act: Callable[[], None]) -> Iterator[None]:
    """Inside, an interrupt calls something. Where interrupts are ignored they stay so."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, lambda *_: act())
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
