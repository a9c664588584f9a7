"""Print the error of a failed command and choose its exit status. Tracebacks appear only with ``GRAFTC_DEBUG=1``."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import sys
import traceback
from collections.abc import Callable
from typing import Any, TextIO, TypeVar

from graftc.cli.process import INTERRUPTED
from graftc.specs.errors.diagnostics import GraftError

T = TypeVar("T")


_NO_READER = 141
"""The usual exit status of tools that write to a broken pipe: 128 plus SIGPIPE."""
_SUGGESTION = re.compile(r"\.? (?:Did you mean:?|\(Possible options:) (.*?)[?)]*$")


def show_failure(error: Exception, out: Watched, *, as_json: bool) -> int:
    """Print a failure and return the exit status.

    The failure is printed to stderr in the text form of diagnostics, or with ``as_json`` to stdout (``out``) as
    ``{"error": {...}}``. A misused command line is GC090; an unexpected error is GC099. If stdout itself has failed,
    nothing is printed here, because `finish` reports that.
    """
    if type(error).__name__ == "Abort":
        return INTERRUPTED
    if out.failure is not None:
        return 3
    if os.environ.get("GRAFTC_DEBUG") == "1":
        traceback.print_exception(error)
    coded = _coded(error)
    from graftc.cli.output import print_coded, print_json

    if as_json:
        with contextlib.suppress(OSError):  # `finish` reports it
            print_json({"error": coded.to_json()})
    else:
        print_coded(coded, "red")
    return coded.exit_code


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


def _coded(error: Exception) -> GraftError:
    if isinstance(error, GraftError):
        return error
    return _usage(error) if hasattr(error, "format_message") else _unexpected(error)


def _usage(error: Any) -> GraftError:
    """Return the error for a command line that Typer rejects."""
    context = getattr(error, "ctx", None)
    command = context.command_path if context is not None else "graftc"
    message = " ".join(str(error.format_message()).split())
    suggestion = _SUGGESTION.search(message)
    if suggestion is not None:
        message = message[: suggestion.start()]
    hints = ([f"did you mean {suggestion[1]}?"] if suggestion is not None else []) + [f"{command} --help"]
    return GraftError("GC090", (message[:1].lower() + message[1:]).rstrip("."), hint="\n".join(hints))


def _unexpected(error: Exception) -> GraftError:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    message = f"unexpected {type(error).__name__}" + (f": {lines[0]}" if lines else "")
    return GraftError("GC099", message, hint="set GRAFTC_DEBUG=1 for a traceback; please report it")
