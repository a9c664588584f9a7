"""Suppression of what libraries print, warn of and log without being asked, with all other messages kept.

Torch emits many messages while it makes a graph (`quiet`), and so do the libraries that transformers imports because
they are installed, while it imports them (`quiet_quantisers`).

Standard streams, loggers and warning filters belong to the whole process. Only the messages of one thread are dropped
here, and those of other threads get through.
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
"""Imports the library of every quantiser that is installed, and every model of transformers imports it."""
_withheld: list[logging.LogRecord] = []


class _WithoutOne:
    """A stream that drops what one thread writes, until `end` is called; then it only passes on."""

    def __init__(self, stream: TextIO) -> None:
        self._stream, self._thread = stream, cast("int | None", threading.get_ident())

    def write(self, text: str) -> int:
        """Write the text to the stream, or drop it if that thread writes it."""
        return len(text) if threading.get_ident() == self._thread else self._stream.write(text)

    def end(self) -> None:
        """Stop dropping text."""
        self._thread = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def _without_errors() -> Iterator[None]:
    """Suppress what this thread writes to the standard error while the block runs."""
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
    """A filter that drops what one thread logs to some libraries' loggers below a level."""

    def __init__(self, libraries: Sequence[str], least: int) -> None:
        super().__init__()
        self._libraries, self._least, self._thread = libraries, least, threading.get_ident()

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether the record is from another thread, from another library or at least of the level."""
        own = record.thread == self._thread and record.name.partition(".")[0] in self._libraries
        return not own or record.levelno >= self._least


class _Unasked(logging.Filter):
    """A filter that holds back what other libraries log below errors while transformers imports its quantisers."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether to let the record pass; keep it for `tell` otherwise.

        This is decided by the stack of the thread that logs, which is the one that imports.
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

    A filter of a logger would not see the records of the loggers below it.
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
    """Hold back log records about quantiser libraries that transformers imports only because they are installed.

    Errors are not held back. `tell` repeats the records of a library that is used after all.
    """
    with _filtered(_Unasked()):
        yield


def tell(library: str) -> None:
    """Log what `quiet_quantisers` held back of a library that is used after all, once.

    Args:
        library: the first part of the loggers' names.
    """
    for record in [r for r in _withheld if r.name.partition(".")[0] == library]:
        _withheld.remove(record)
        logging.getLogger(record.name).handle(record)


@contextmanager
def quiet(libraries: Sequence[str], least: int = logging.ERROR) -> Iterator[None]:
    """Suppress warnings, standard error and some libraries' log records of this thread while the block runs.

    For one thread at a time: use it inside of `exclusive`.

    Args:
        libraries: the first parts of the loggers' names.
        least: the level from which records are logged.
    """
    with warnings.catch_warnings(), _without_errors(), _filtered(_Unheard(libraries, least)):
        warnings.simplefilter("ignore")
        yield
