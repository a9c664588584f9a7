"""Standard output that may fail: its reader is gone, or the disk that it is redirected to is full."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from collections.abc import Callable
from typing import Any, TextIO, TypeVar

from graftc.specs.errors.diagnostics import GraftError

T = TypeVar("T")

_NO_READER = 141
"""The usual exit status of tools that write to a broken pipe: 128 plus SIGPIPE."""


class Watched:
    """Wrapper around stdout that remembers why writing failed, and otherwise behaves like the wrapped stream."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self.failure: OSError | None = None

    def write(self, text: str) -> int:
        """Write to the stream."""
        return self._watched(lambda: self.stream.write(text))

    def flush(self) -> None:
        """Flush the stream."""
        self._watched(self.stream.flush)

    def _watched(self, act: Callable[[], T]) -> T:
        try:
            return act()
        except OSError as error:
            self.failure = self.failure or error
            raise

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def finish(out: Watched, status: int) -> int:
    """Flush the output and return the exit status: 141 if its reader is gone, 3 if it cannot be written (GC064)."""
    with contextlib.suppress(OSError):
        out.flush()
    failure = out.failure
    if failure is not None:
        _silence(out.stream)
        if failure.errno == errno.EPIPE:
            return _NO_READER
        from graftc.cli.output import print_coded

        reason = (failure.strerror or str(failure)).lower()
        hint = "free some space, or redirect the output"
        coded = GraftError("GC064", f"stdout cannot be written: {reason}", hint=hint)
        print_coded(coded, "red")
        status = coded.exit_code
    try:
        sys.stderr.flush()
    except OSError:  # there is nowhere left to report it
        _silence(sys.stderr)
    return status


def _silence(stream: TextIO) -> None:
    """Redirect a stream to the null device, so that flushing its buffer at exit does not fail again."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
