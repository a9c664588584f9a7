"""Items that run in a process of their own each: forks of a server that has imported everything, under limits."""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, Generic, TypeVar

T = TypeVar("T")
Record = dict[str, Any]
_DONE = "_done"


@dataclass
class Job(Generic[T]):
    """An item whose process runs.

    Attributes:
        item: the item.
        record: what the process has sent last.
        process: the process.
        receiver: the connection on which records arrive.
        started: when it began, as `time.monotonic` has it.
    """

    item: T
    record: Record
    process: BaseProcess
    receiver: Connection
    started: float

    @property
    def seconds(self) -> float:
        """The time since the process began."""
        return time.monotonic() - self.started

    @property
    def ending(self) -> str:
        """The signal that ended the process, or its exit status."""
        code = self.process.exitcode
        return signal.Signals(-code).name if code is not None and code < 0 else f"exit {code}"

    def receive(self) -> bool:
        """Receive what the process has sent, and return whether the last record is there.

        Raises:
            EOFError, OSError: if the process ended without a last record.
        """
        while self.receiver.poll():
            self.record = self.receiver.recv()
            if self.record.pop(_DONE, False):
                return True
        return False

    def stop(self) -> None:
        """Wait for the process for two seconds, and kill it if it still runs."""
        self.process.join(timeout=2)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()


def run_forked(
    items: Sequence[T],
    work: Callable[..., None],
    arguments: Sequence[Any],
    *,
    first: Callable[[T], Record],
    died: Callable[[Job[T]], Record],
    late: Callable[[Job[T]], Record | None],
    jobs: int,
    preload: Sequence[str],
) -> Generator[tuple[Job[T], Record]]:
    """Run every item in a process of its own, and yield each with its record when it is done.

    Args:
        items: the items, in the order in which they begin.
        work: the function that a process runs, with a connection for records, the item and ``arguments``; it sends the
            last record with `finish`.
        arguments: the other arguments of ``work``.
        first: returns the record that an item has before its process has sent one.
        died: returns the record of an item whose process ended without a last record.
        late: returns the record of an item that has had its time, and None for others.
        jobs: the number of processes at a time.
        preload: the modules that the server imports once.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(preload))
    waiting, running = list(reversed(items)), list[Job[T]]()
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                running.append(_start(context, waiting.pop(), work, arguments, first))
            wait([job.receiver for job in running], timeout=1.0)
            for job in list(running):
                record = _outcome(job, died, late)
                if record is not None:
                    running.remove(job)
                    yield job, record
    finally:
        for job in running:
            job.process.kill()
            job.process.join()


def _start(
    context: Any, item: T, work: Callable[..., None], arguments: Sequence[Any], first: Callable[[T], Record]
) -> Job[T]:
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=work, args=(sender, item, *arguments), daemon=True)
    process.start()
    sender.close()
    return Job(item, first(item), process, receiver, time.monotonic())


def _outcome(job: Job[T], died: Callable[[Job[T]], Record], late: Callable[[Job[T]], Record | None]) -> Record | None:
    """Return the record of an item whose process is done, dead or out of time; None while it runs."""
    try:
        if job.receive():
            job.stop()
            return job.record
    except (EOFError, OSError):
        job.process.join(timeout=30)
        return died(job)
    record = late(job)
    if record is not None:
        job.process.kill()
        job.process.join()
    return record


def finish(sender: Connection, record: Mapping[str, Any]) -> None:
    """Send the last record of an item."""
    sender.send({**record, _DONE: True})
    sender.close()


def confine(memory: int, seconds: int | None = None) -> None:
    """Limit this process, and silence it.

    Args:
        memory: the bytes of data that it may allocate.
        seconds: the CPU time that it may take.
    """
    resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))
    if seconds is not None:
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 5))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    silent = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silent, 1)
    os.dup2(silent, 2)
