"""Progress of long-running work: the activity, its current step, and the elapsed time.

Without a listener, a status line is shown on stderr, if that is a terminal, once work has taken two seconds; it remains
when the work ends. ``GRAFTC_PROGRESS=off`` turns this off; ``on`` also writes the final line without a terminal. This
module needs only the standard library.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TextIO

from graftc.passes.core.contexts import having

AFTER, EVERY = 2.0, 1.0
"""Seconds before the first update, and between updates."""

Listener = Callable[[str, float], None]
"""A function that receives the current step (empty if there is none) and the elapsed seconds. It is called from another
thread, first after two seconds and then every second."""


@dataclass
class _Work:
    """Work in progress."""

    name: str
    began: float = field(default_factory=time.monotonic)
    step: str = ""

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.began


_WORK: ContextVar[_Work | None] = ContextVar("_WORK", default=None)
_LISTENER: ContextVar[Listener | None] = ContextVar("_LISTENER", default=None)
_SHOWN: ContextVar[bool | None] = ContextVar("_SHOWN", default=None)


def step(name: str) -> None:
    """Set the current step of the work in progress."""
    work = _WORK.get()
    if work is not None:
        work.step = name


def listening(listener: Listener) -> AbstractContextManager[None]:
    """Report this thread's progress only to a listener while the block runs, without showing anything."""
    return having(_LISTENER, listener)


def shown(show: bool | None) -> AbstractContextManager[None]:
    """Show or hide this thread's progress while the block runs; None keeps the current setting."""
    return having(_SHOWN, _SHOWN.get() if show is None else show)


@contextmanager
def working(doing: str, name: str) -> Iterator[None]:
    """Report the progress of a block that may take a long time; nested work counts as part of the outer work.

    Args:
        doing: the activity, such as ``compiling``.
        name: the object of the activity, such as a model class or a directory.
    """
    listener, line = _LISTENER.get(), None
    if listener is None and _wanted():
        listener = line = _Line(f"{doing} {name}", sys.stderr)
    if listener is None or _WORK.get() is not None:
        yield
        return
    work, over = _Work(name), threading.Event()
    told = listener

    def tell() -> None:
        wait = AFTER
        while not over.wait(wait):
            told(work.step, work.seconds)
            wait = EVERY

    thread = threading.Thread(target=tell, name="graftc progress", daemon=True)
    thread.start()
    try:
        with having(_WORK, work):
            yield
    finally:
        over.set()
        thread.join()
        if line is not None and work.seconds >= AFTER:
            line.end(work.seconds)


def _wanted() -> bool:
    show = _SHOWN.get()
    if show is not None:
        return show
    setting = os.environ.get("GRAFTC_PROGRESS", "").lower()
    return setting in ("on", "1") if setting in ("on", "off", "1", "0") else _is_terminal(sys.stderr)


def _is_terminal(stream: TextIO) -> bool:
    with suppress(Exception):  # some streams have no such method, and others are closed
        return stream.isatty() and os.environ.get("TERM") != "dumb"
    return False


class _Line:
    """A status line that is overwritten until the work ends; without a terminal, it is written once, at the end."""

    def __init__(self, work: str, stream: TextIO) -> None:
        self._work, self._stream, self._width = work, stream, 0
        self._over = _is_terminal(stream)

    def __call__(self, step: str, seconds: float) -> None:
        if self._over:
            at = f": {step}" if step else ""
            self._write(f"graftc: {self._work}{at}, {seconds:.0f} s")

    def end(self, seconds: float) -> None:
        """Write how long the work took."""
        self._write(f"graftc: {self._work} took {seconds:.1f} s", "\n")

    def _write(self, text: str, end: str = "") -> None:
        with suppress(Exception):  # work must not fail because progress cannot be shown
            self._stream.write(("\r" + text.ljust(self._width) if self._over else text) + end)
            self._stream.flush()
        self._width = len(text)
