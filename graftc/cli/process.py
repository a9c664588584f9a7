"""Set up a command's process: writable streams, valid terminal sizes, interrupts without tracebacks.

This module uses only the smallest modules of the standard library, since it runs before anything else is imported.
"""

from __future__ import annotations

import os
import signal
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


INTERRUPTED = 130
"""The exit status after SIGINT."""

_LEAST = 20
"""The minimum number of columns or lines that is accepted as a terminal size."""

_state = {"started": False, "interrupted": False}


def prepare() -> None:
    """Prepare a command's process; call this once, before anything that takes time."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # otherwise it is ignored on purpose
        signal.signal(signal.SIGINT, _interrupt)
        sys.unraisablehook = _unraisable
    # Reserve closed descriptors, so that a file opened later cannot become stdout. The substitute for stdout is
    # read-only, so that writing fails as it does with a closed descriptor; output to a closed stderr is lost.
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
    """From now on, turn interrupts into exceptions, so that unfinished work is cleaned up."""
    _state["started"] = True


def interrupted() -> bool:
    """Return whether an interrupt has arrived, even if a library has turned it into another error."""
    return _state["interrupted"]


def _interrupt(number: int, frame: Any) -> None:
    if _state["interrupted"] or not _state["started"]:
        os._exit(INTERRUPTED)
    _state["interrupted"] = True
    raise KeyboardInterrupt


def _unraisable(unraisable: Any) -> None:
    if not (_state["interrupted"] and unraisable.exc_type is KeyboardInterrupt):
        sys.__unraisablehook__(unraisable)


def sane_sizes() -> None:
    """Remove terminal sizes that are invalid or out of range from the environment, because libraries fail on them."""
    for name in ("COLUMNS", "LINES", "TERMINAL_WIDTH"):
        value = os.environ.get(name)
        if value is not None and not (value.isascii() and value.isdigit() and _LEAST <= int(value[:9]) < 100_000):
            del os.environ[name]
