"""Faults on purpose: a process that is killed, or whose disk is full, at each thing it asks of the file system."""

from __future__ import annotations

import errno
import os
import signal
import sys
import traceback
from collections.abc import Callable
from typing import Literal

from tests.forks import fork

Fault = Literal["kill", "enospc"]
_FILES = ("open", "os.", "shutil.", "tempfile.")
_NEEDING_SPACE = ("os.mkdir", "os.rename", "os.link", "os.symlink")
FAILED, CRASHED = 7, 8


class Faulty:
    """An audit hook that lets a number of requests to the file system pass and makes the next one fail. A full disk
    fails those that may need room.

    Args:
        fault: die at once, as by ``kill -9``, or find the disk full, once.
        passing: how many requests pass; None for all.
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
        self.active = False  # what follows asks the system for things too
        if self.fault == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def run_with_fault(work: Callable[[], object], fault: Fault, passing: int | None) -> int:
    """Run ``work`` in a fork of this process.

    Returns:
        0 it was done, ``FAILED`` it raised a GraftError of code GC064, ``CRASHED`` it raised anything else, or the
        negative number of the signal that ended it.
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
    """How many requests to the file system ``work`` makes that the fault can meet, counted in a fork."""
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
