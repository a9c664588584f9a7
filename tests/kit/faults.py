"""Fault injection: a process that is killed, or whose disk is full, at any chosen request to the file system."""

from __future__ import annotations

import errno
import os
import signal
import sys
import traceback
from collections.abc import Callable
from typing import Literal

from tests.kit.forks import fork

Fault = Literal["kill", "enospc"]
_FILES = ("open", "os.", "shutil.", "tempfile.")
_NEEDING_SPACE = ("os.mkdir", "os.rename", "os.link", "os.symlink")
FAILED, CRASHED = 7, 8


class Faulty:
    """An audit hook that lets a number of requests to the file system pass and makes the next one fail.

    A full disk fails only requests that may need space.

    Args:
        fault: whether to die at once, as by ``kill -9``, or to report a full disk, once.
        passing: the number of requests that pass; None for all.
    """

    def __init__(self, fault: Fault, passing: int | None) -> None:
        self.fault, self.passing, self.seen, self.active = fault, passing, 0, True

    def __call__(self, event: str, arguments: tuple[object, ...]) -> None:
        if not self.active or not event.startswith(_FILES):
            return
        writes = event == "open" and bool(int(str(arguments[2])) & (os.O_WRONLY | os.O_RDWR))
        if self.fault == "enospc" and not writes and event not in _NEEDING_SPACE:
            return
        self.seen += 1
        if self.passing is None or self.seen <= self.passing:
            return
        self.active = False  # what follows makes requests as well
        if self.fault == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def run_with_fault(work: Callable[[], object], fault: Fault, passing: int | None) -> int:
    """Run ``work`` in a fork of this process with a fault injected.

    Returns:
        0 if the work completed, ``FAILED`` if it raised a GraftError of code GC064, ``CRASHED`` if it raised anything
        else, or the negative number of the signal that ended it.
    """
    from graftc.specs.errors.diagnostics import GraftError

    child = fork()
    if child == 0:
        status = CRASHED
        hook = Faulty(fault, passing)
        try:
            sys.addaudithook(hook)
            work()
            status = 0
        except GraftError as error:
            status = FAILED if error.code == "GC064" else CRASHED
        except BaseException:
            hook.active = False
            traceback.print_exc()
            sys.stderr.flush()
        finally:
            hook.active = False
            os._exit(status)
    _, code = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(code)


def requests_of(work: Callable[[], object], fault: Fault) -> int:
    """Return how many of the requests that ``work`` makes to the file system the fault can hit, counted in a fork."""
    read, write = os.pipe()
    child = fork()
    if child == 0:
        hook = Faulty(fault, None)
        try:
            sys.addaudithook(hook)
            work()
        finally:
            hook.active = False
            os.write(write, str(hook.seen).encode())
            os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        count = int(pipe.read())
    os.waitpid(child, 0)
    return count
