"""A process that does jobs in forks of itself, to be killed at any moment.

Each line on its standard input is a job and a number of seconds, ``none`` for as long as it takes; a fork does the job
and is killed after that time. The line that comes back is its status and how long it ran.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from tests.cli.support import ROOT


class Worker:
    """The other process.

    Args:
        module: what it runs: a module that calls `serve`.
        folder: its argument.
    """

    def __init__(self, module: str, folder: Path) -> None:
        one = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        environment = {**os.environ, **one, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self.process = subprocess.Popen(
            [sys.executable, "-m", module, str(folder)],
            **{"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self._errors, "text": True},
            cwd=ROOT,
            env=environment,
        )
        assert self.answer() == "ready"

    def answer(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def told(self) -> str:
        """The end of what jobs have written to standard error, the traceback of one that failed among it."""
        self._errors.seek(0)
        return self._errors.read()[-4000:]

    def run(self, job: str, seconds: float | None = None) -> tuple[int, float]:
        """Status and time of a job that is killed after some seconds."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{job} {'none' if seconds is None else seconds}\n")
        self.process.stdin.flush()
        status, took = self.answer().split()
        return int(status), float(took)


def fork() -> int:
    """`os.fork`; the child computes with one thread. Those that libraries keep ready stay with the parent, and the
    child would wait for them for ever."""
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)
    return child


def run(job: Callable[[], object], seconds: float | None) -> tuple[int, float]:
    """The status of a fork that does a job and is killed after some seconds, and how long it ran."""
    started = time.perf_counter()
    child = fork()
    if child == 0:
        status = 1
        try:
            job()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    _, code = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(code), time.perf_counter() - started


def serve(jobs: Mapping[str, Callable[[], object]]) -> None:
    """Do jobs until the input ends."""
    print("ready", flush=True)
    for line in sys.stdin:
        name, _, seconds = line.strip().rpartition(" ")
        status, took = run(jobs[name], None if seconds == "none" else float(seconds))
        print(status, took, flush=True)
