"""A process that runs jobs in forks of itself, which can be killed at any moment.

Each line on its standard input is a job and a number of seconds, or ``none`` for no limit; a fork runs the job and is
killed after that time. The line it answers is the fork's status and how long it ran.
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

from tests.kit.places import ROOT


class Worker:
    """A handle of the worker process.

    Args:
        module: the module that the process runs, which calls `serve`.
        folder: the argument of the module.
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
        """Return the last part of what jobs have written to standard error, including the traceback of a failed one."""
        self._errors.seek(0)
        return self._errors.read()[-4000:]

    def run(self, job: str, seconds: float | None = None) -> tuple[int, float]:
        """Run a job, kill it after some seconds, and return its status and how long it ran."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{job} {'none' if seconds is None else seconds}\n")
        self.process.stdin.flush()
        status, took = self.answer().split()
        return int(status), float(took)


def fork() -> int:
    """Call `os.fork` and make the child compute with one thread.

    The thread pools of libraries stay with the parent, and the child would wait for their threads forever.
    """
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)
    return child


def run(job: Callable[[], object], seconds: float | None) -> tuple[int, float]:
    """Run a job in a fork that is killed after some seconds, and return its status and how long it ran."""
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
    """Run jobs until the input ends."""
    print("ready", flush=True)
    for line in sys.stdin:
        name, _, seconds = line.strip().rpartition(" ")
        status, took = run(jobs[name], None if seconds == "none" else float(seconds))
        print(status, took, flush=True)
