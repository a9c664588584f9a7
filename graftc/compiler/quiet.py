"""Suppress unsolicited output, warnings and log records of libraries, but let all other messages through.

torch emits many messages while it creates a graph (see `quiet`), and so do libraries that transformers imports merely
because they are installed (see `quiet_quantisers`).

Standard streams, loggers and warning filters are process-wide. Only one thread's messages are dropped here; those of
other threads get through.
"""

from __future__ import annotations

import logging
import sys
import threading
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TextIO, cast

_IMPORTING = "transformers.quantizers"
"""The module that imports every installed quantiser's library; every transformers model imports it."""
_withheld: list[logging.LogRecord] = []


class _WithoutOne:
    """A stream that drops what one thread writes, until `end` is called; from then on, it drops nothing."""

    def __init__(self, stream: TextIO) -> None:
        self._stream, self._thread = stream, cast("int | None", threading.get_ident())

    def write(self, text: str) -> int:
        """Write the text to the stream, or drop it if it comes from that thread."""
        return len(text) if threading.get_ident() == self._thread else self._stream.write(text)

    def end(self) -> None:
        """Stop dropping text."""
        self._thread = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def _without_errors() -> Iterator[None]:
    """Suppress what this thread writes to stderr while the block runs."""
    before = sys.stderr
    if before is None:  # as under pythonw
        yield
        return
    ours = _WithoutOne(before)
    sys.stderr = cast(TextIO, ours)
    try:
        yield
    finally:
        ours.end()
        if sys.stderr is cast(Any, ours):  # other code may have replaced it in the meantime
            sys.stderr = before


class _Unheard(logging.Filter):
    """A filter that drops one thread's records below a level from some libraries' loggers."""

    def __init__(self, libraries: Sequence[str], least: int) -> None:
        super().__init__()
        self._libraries, self._least, self._thread = libraries, least, threading.get_ident()

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether the record is from another thread, from another library, or at or above the level."""
        own = record.thread == self._thread and record.name.partition(".")[0] in self._libraries
        return not own or record.levelno >= self._least


class _Unasked(logging.Filter):
    """A filter that holds back other libraries' records below ERROR while transformers imports its quantisers."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether to let the record pass; otherwise, store it for `tell`.

        The decision depends on the stack of the thread that logs, which is also the thread that imports.
        """
        if record.levelno >= logging.ERROR or record.name.partition(".")[0] == "transformers":
            return True
        frames = (frame for frame, _ in traceback.walk_stack(None))
        if not any(f.f_code.co_name == "<module>" and f.f_globals.get("__name__") == _IMPORTING for f in frames):
            return True
        if all(record is not other for other in _withheld):  # every handler calls the filter
            _withheld.append(record)
        return False


@contextmanager
def _filtered(ours: logging.Filter) -> Iterator[None]:
    """Add a filter to all existing handlers while the block runs.

    A filter on a logger would not see the records of its child loggers.
    """
    loggers = [x for x in list(logging.root.manager.loggerDict.values()) if isinstance(x, logging.Logger)]
    handlers = [handler for logger in [logging.root, *loggers] for handler in logger.handlers]
    handlers += [logging.lastResort] if logging.lastResort is not None else []
    for handler in handlers:
        handler.addFilter(ours)
    try:
        yield
    finally:
        for handler in handlers:
            handler.removeFilter(ours)


@contextmanager
def quiet_quantisers() -> Iterator[None]:
    """Hold back log records of quantiser libraries that transformers imports only because they are installed.

    Errors are not held back. `tell` repeats the records of a library that is used after all.
    """
    with _filtered(_Unasked()):
        yield


def tell(library: str) -> None:
    """Log, once, the records that `quiet_quantisers` held back for a library that is used after all.

    Args:
        library: the first component of the loggers' names.
    """
    for record in [r for r in _withheld if r.name.partition(".")[0] == library]:
        _withheld.remove(record)
        logging.getLogger(record.name).handle(record)


@contextmanager
def quiet(libraries: Sequence[str], least: int = logging.ERROR) -> Iterator[None]:
    """Suppress this thread's warnings, stderr output and some libraries' log records while the block runs.

    Only one thread at a time may use it: call it within `exclusive`.

    Args:
        libraries: the first components of the loggers' names.
        least: the lowest level of records that are still logged.
    """
    with warnings.catch_warnings(), _without_errors(), _filtered(_Unheard(libraries, least)):
        warnings.simplefilter("ignore")
        yield
