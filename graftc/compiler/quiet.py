"""What torch prints while it makes a graph: nobody sees it, and nobody else's words are lost.

Standard streams, loggers and filters of warnings belong to the whole process. Here one thread's own words are dropped
and those of the others get through.
"""

from __future__ import annotations

import logging
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TextIO, cast

__all__ = ["quiet"]


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


@contextmanager
def _unlogged(libraries: Sequence[str], least: int) -> Iterator[None]:
    """Inside, no handler is told of what this thread logs there below a level.

    Handlers have the filter: a filter of a logger does not see what those below it log.
    """
    known = [name for name in list(logging.root.manager.loggerDict) if name.partition(".")[0] in libraries]
    loggers = [logging.root, *(logging.getLogger(name) for name in known)]
    handlers = [handler for logger in loggers for handler in logger.handlers]
    handlers += [logging.lastResort] if logging.lastResort is not None else []
    ours = _Unheard(libraries, least)
    for handler in handlers:
        handler.addFilter(ours)
    try:
        yield
    finally:
        for handler in handlers:
            handler.removeFilter(ours)


@contextmanager
def quiet(libraries: Sequence[str], least: int = logging.ERROR) -> Iterator[None]:
    """Inside, this thread warns of nothing, writes nothing to the standard error and logs nothing to some libraries'
    loggers. For one thread at a time: inside of `exclusive`.

    Args:
        libraries: the first parts of the loggers' names.
        least: the level from which they are heard.
    """
    with warnings.catch_warnings(), _without_errors(), _unlogged(libraries, least):
        warnings.simplefilter("ignore")
        yield
