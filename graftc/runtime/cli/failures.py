"""What a command prints when it fails, and its exit status. Never a traceback, unless ``GRAFTC_DEBUG=1``."""

from __future__ import annotations

import os
import re
import sys
import traceback
from typing import Any

from graftc.specs.diagnostics import GraftError

__all__ = ["show_failure"]

_INTERRUPTED = 130
_SUGGESTION = re.compile(r"\.? (?:Did you mean:?|\(Possible options:) (.*?)[?)]*$")


def show_failure(error: Exception, *, as_json: bool) -> int:
    """Print a failure and return the exit status.

    It goes to the standard error in the text form of diagnostics; with ``as_json`` the standard output gets
    ``{"error": {...}}`` instead. A misused command line is GC090, what graftc does not expect GC099.
    """
    if isinstance(error, BrokenPipeError):
        # The reader has gone: what is left in the buffer must not fail again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    if type(error).__name__ == "Abort":
        return _INTERRUPTED
    if os.environ.get("GRAFTC_DEBUG") == "1":
        traceback.print_exception(error)
    coded = _coded(error)
    from graftc.runtime.cli.output import print_coded, print_json

    if as_json:
        from graftc.runtime.cli.results.base import ErrorResult

        print_json(ErrorResult.model_validate({"error": coded.to_json()}))
    else:
        print_coded(coded, "red")
    return coded.exit_code


def _coded(error: Exception) -> GraftError:
    if isinstance(error, GraftError):
        return error
    return _usage(error) if hasattr(error, "format_message") else _unexpected(error)


def _usage(error: Any) -> GraftError:
    """A command line that Typer refuses."""
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
    return GraftError("GC099", message, hint="GRAFTC_DEBUG=1 shows where; please report it")
