"""What a command owes to its process: streams that can be written, sizes that are numbers, interrupts without traces.

The standard library's smallest modules only: this runs before anything else is imported.
"""

from __future__ import annotations

import os
import signal
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

__all__ = ["INTERRUPTED", "interrupted", "prepare", "sane_sizes", "started"]

INTERRUPTED = 130
"""The exit status after SIGINT."""

_LEAST = 20
"""Columns and lines of the smallest terminal that is believed."""

_state = {"started": False, "interrupted": False}


def prepare() -> None:
    """Make the process of a command ready: called once, before anything that takes time."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else somebody wants it ignored
        signal.signal(signal.SIGINT, _interrupt)
        sys.unraisablehook = _unraisable
    # A file that is opened later must not become the standard output. Reading only, so that writing to it fails as it
    # does where it is closed; what goes to a closed standard error is lost.
    for number, how in ((0, os.O_RDONLY), (1, os.O_RDONLY), (2, os.O_WRONLY)):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, how)
    if sys.stdout is None:
        sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    if sys.stderr is None:
        sys.stderr = open(2, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    reconfigure = getattr(sys.stdout, "reconfigure", None)
    if reconfigure is not None:
        reconfigure(errors="backslashreplace")


def started() -> None:
    """From here on an interrupt is an exception, so that what is half done is cleared away."""
    _state["started"] = True


def interrupted() -> bool:
    """Whether an interrupt has come, whatever libraries have made of it."""
    return _state["interrupted"]


def _interrupt(number: int, frame: Any) -> None:
    if _state["interrupted"] or not _state["started"]:
        os._exit(INTERRUPTED)
    _state["interrupted"] = True
    raise KeyboardInterrupt


def _unraisable(found: Any) -> None:
    if not (_state["interrupted"] and found.exc_type is KeyboardInterrupt):
        sys.__unraisablehook__(found)


def sane_sizes() -> None:
    """Forget sizes of the terminal that are not numbers, or none that anything fits in: libraries fail on them."""
    for name in ("COLUMNS", "LINES", "TERMINAL_WIDTH"):
        value = os.environ.get(name)
        if value is not None and not (value.isascii() and value.isdigit() and _LEAST <= int(value[:9]) < 100_000):
            del os.environ[name]
