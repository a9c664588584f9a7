"""Print the error of a failed command and choose its exit status. Tracebacks appear only with ``GRAFTC_DEBUG=1``."""

from __future__ import annotations

import contextlib
import os
import re
import traceback
from typing import Any

from graftc.cli.process import INTERRUPTED
from graftc.cli.standard_output import Watched
from graftc.specs.errors.diagnostics import GraftError

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
