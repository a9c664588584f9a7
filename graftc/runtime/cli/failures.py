"""What a command prints when it fails, and its exit status. Never a traceback, unless ``GRAFTC_DEBUG=1``."""

from __future__ import annotations

import os
import sys
import traceback
from typing import Any

from graftc.specs.diagnostics import GraftError

__all__ = ["show_failure"]

_USAGE, _UNEXPECTED, _INTERRUPTED = 2, 3, 130


def show_failure(error: Exception, *, as_json: bool) -> int:
    """Print a failure and return the exit status.

    Coded errors go to the standard error in the text form of diagnostics. With ``as_json`` the standard output gets
    ``{"error": {...}}`` instead; what has no code of the catalogue (a misused command line, a bug) has code null.
    """
    if isinstance(error, BrokenPipeError):
        # The reader has gone: what is left in the buffer must not fail again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    if type(error).__name__ == "Abort":
        return _INTERRUPTED
    if os.environ.get("GRAFTC_DEBUG") == "1":
        traceback.print_exception(error)
    if isinstance(error, GraftError):
        data, text = error.to_json(), str(error)
    elif hasattr(error, "format_message"):
        data, text = _usage(error)
    else:
        data, text = _unexpected(error)
    from graftc.runtime.cli.output import print_coded, print_json

    if as_json:
        print_json({"error": data})
    else:
        print_coded(text, "red")
    return int(data["exit_code"])


def _usage(error: Any) -> tuple[dict[str, Any], str]:
    """A command line that Typer refuses."""
    context = getattr(error, "ctx", None)
    command = context.command_path if context is not None else "graftc"
    message = str(error.format_message()).strip()
    message = (message[:1].lower() + message[1:]).rstrip(".")
    return _plain("usage", f"usage: {message}", f"{command} --help", _USAGE)


def _unexpected(error: Exception) -> tuple[dict[str, Any], str]:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    message = f"unexpected {type(error).__name__}" + (f": {lines[0]}" if lines else "")
    return _plain("unexpected", message, "GRAFTC_DEBUG=1 shows where; please report it", _UNEXPECTED)


def _plain(title: str, message: str, hint: str, status: int) -> tuple[dict[str, Any], str]:
    """In the form of coded errors, without a code."""
    places = dict.fromkeys(("file", "line", "column"))
    data = {"code": None, "title": title, "message": message, **places, "path": "", "hint": hint}
    return {**data, "corrected": None, "details": [], "exit_code": status}, f"{message}\n  hint: {hint}"
