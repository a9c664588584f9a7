"""Silence for what libraries print, warn of and log unasked, without losing what anything else says.

Torch has much to say while it makes a graph (`quiet`), and the libraries that transformers imports because they are
installed while it imports them (`quiet_quantisers`).

Standard streams, loggers and filters of warnings belong to the whole process. Here one thread's own words are dropped
and those of the others get through.
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

__all__ = ["quiet", "quiet_quantisers", "tell"]

_IMPORTING = "transformers.quantizers"
"""Imports the library of every quantiser that is installed, and every model of transformers imports it."""
_withheld: list[logging.LogRecord] = []


class _WithoutOne:
    """A stream that drops what one thread writes. Whoever holds it when that is over holds the stream itself."""

    def __init__(self, stream: TextIO) -> None:
        self._stream, self._thread = stream, cast("int | None", threading.get_ident())

    def write(self, text: str) -> int:
        """See `io.TextIOBase.write`."""
        return len(text) if threading.get_ident() == self._thread else self._stream.write(text)

    def end(self) -> None:
        """From here on nothing is dropped."""
        self._thread = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def _without_errors() -> Iterator[None]:
    """Inside, this thread writes nothing to the standard error."""
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
        if sys.stderr is cast(Any, ours):  # somebody else may have exchanged it meanwhile
            sys.stderr = before


class _Unheard(logging.Filter):
    """Drops what one thread logs to some libraries' loggers below a level."""

    def __init__(self, libraries: Sequence[str], least: int) -> None:
        super().__init__()
        self._libraries, self._least, self._thread = libraries, least, threading.get_ident()

    def filter(self, record: logging.LogRecord) -> bool:
        """See `logging.Filter`."""
        own = record.thread == self._thread and record.name.partition(".")[0] in self._libraries
        return not own or record.levelno >= self._least


class _Unasked(logging.Filter):
    """Holds back what other libraries than transformers log below errors while it imports its quantisers."""

    def filter(self, record: logging.LogRecord) -> bool:
        """See `logging.Filter`. Looks at the stack of the thread that logs, which is the one that imports."""
        if record.levelno >= logging.ERROR or record.name.partition(".")[0] == "transformers":
            return True
        frames = (frame for frame, _ in traceback.walk_stack(None))
        if not any(f.f_code.co_name == "<module>" and f.f_globals.get("__name__") == _IMPORTING for f in frames):
            return True
        if all(record is not other for other in _withheld):  # each handler asks
            _withheld.append(record)
        return False


@contextmanager
def _filtered(ours: logging.Filter) -> Iterator[None]:
    """Inside, the handlers there are have a filter: one of a logger does not see what those below it log."""
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
    """Inside, nothing is heard of the libraries of quantisers that transformers imports only because they are
    installed, errors apart, and of what torch says of them. `tell` repeats it where one of them is used after all."""
    with _filtered(_Unasked()):
        yield


def tell(library: str) -> None:
    """Log what `quiet_quantisers` held back of a library that is used after all; once.

    Args:
        library: the first part of the loggers' names.
    """
    for record in [r for r in _withheld if r.name.partition(".")[0] == library]:
        _withheld.remove(record)
        logging.getLogger(record.name).handle(record)


@contextmanager
def quiet(libraries: Sequence[str], least: int = logging.ERROR) -> Iterator[None]:
    """Inside, this thread warns of nothing, writes nothing to the standard error and logs nothing to some libraries'
    loggers. For one thread at a time: inside of `exclusive`.

    Args:
        libraries: the first parts of the loggers' names.
        least: the level from which they are heard.
    """
    with warnings.catch_warnings(), _without_errors(), _filtered(_Unheard(libraries, least)):
        warnings.simplefilter("ignore")
        yield
