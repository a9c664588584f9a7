"""Progress of long work: what is done, the current step, and the time taken. It needs the standard library only.

If there is no listener, a terminal shows one line on the standard error once work has taken two seconds, and keeps it
when the work ends. ``GRAFTC_PROGRESS=off`` turns that off, ``on`` also shows the last line if there is no terminal.
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
"""Seconds until something is shown, and between two times that it is."""

Listener = Callable[[str, float], None]
"""Is told the step that work is at, empty where it has none, and how many seconds it has taken so far: from another
thread, once it has taken two seconds, and every second from then on."""


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
    """Report work in this thread to a listener while the block runs, and show nothing else."""
    return having(_LISTENER, listener)


def shown(show: bool | None) -> AbstractContextManager[None]:
    """Show or hide work in this thread while the block runs; None leaves that unchanged."""
    return having(_SHOWN, _SHOWN.get() if show is None else show)


@contextmanager
def working(doing: str, name: str) -> Iterator[None]:
    """Run a block of work that may take long; work within other work is a part of that.

    Args:
        doing: the activity, such as ``compiling``.
        name: its object: the class of a model, or a directory.
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
    with suppress(Exception):  # some streams have no such method, others are closed
        return stream.isatty() and os.environ.get("TERM") != "dumb"
    return False


class _Line:
    """A line that is overwritten until it ends; without a terminal it is written once, at the end."""

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
