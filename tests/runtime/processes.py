"""Jobs that several processes of one process group run together.

A process that has imported everything forks one process for each rank. When one of them fails, the others are killed,
because they would wait for it.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import sys
import tempfile
import traceback
from datetime import timedelta
from multiprocessing.connection import wait
from pathlib import Path

from tests.kit import warm
from tests.kit.places import ROOT

SECONDS = 120
"""The time limit of the process group."""


def together(job: str, processes: int, folder: Path, *arguments: str, seconds: float = SECONDS) -> None:
    """Run a job in several processes.

    Args:
        job: the function as ``module:name``; it gets its rank, the number of processes, the folder and the arguments.
        processes: the number of processes.
        folder: the folder that the processes write to.
        arguments: further arguments of the job.
        seconds: the time limit of the process group.
    """
    with tempfile.TemporaryDirectory() as place:
        out, err = Path(place, "out"), Path(place, "err")
        given = (job, str(processes), str(folder), str(seconds), *arguments)
        environment = {"GLOO_SOCKET_IFNAME": "lo"}
        status = warm.run("tests.runtime.processes", *given, cwd=ROOT, out=out, err=err, environment=environment)
        said = "\n".join(file.read_text() if file.is_file() else f"no {file.name}" for file in (out, err))
        assert status == 0, f"{job}{arguments} ended with {status}\n{said}"


def _rank(job: str, rank: int, processes: int, folder: Path, seconds: float, arguments: list[str], meet: str) -> None:
    import torch
    import torch.distributed as dist

    status = 1
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(processes))
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT="29500", LOCAL_WORLD_SIZE=str(processes))
    try:
        limit = timedelta(seconds=seconds)
        dist.init_process_group("gloo", init_method=f"file://{meet}", rank=rank, world_size=processes, timeout=limit)
        torch.manual_seed(0)
        module, _, name = job.partition(":")
        getattr(importlib.import_module(module), name)(rank, processes, folder, *arguments)
        dist.destroy_process_group()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def main(job: str, processes: int, folder: Path, seconds: float, arguments: list[str]) -> int:
    """Run a job in several processes and return its status: 0 if every process has finished it, otherwise 1."""
    importlib.import_module(job.partition(":")[0])
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as place:
        meet = str(Path(place, "meet"))
        given = [(job, rank, processes, folder, seconds, arguments, meet) for rank in range(processes)]
        started = [context.Process(target=_rank, args=each) for each in given]
        for process in started:
            process.start()
        waiting = {process.sentinel: process for process in started}
        failed = False
        while waiting and not failed:
            for sentinel in wait(list(waiting)):
                process = waiting.pop(sentinel)  # type: ignore[index]
                process.join()
                failed |= process.exitcode != 0
        for process in waiting.values():
            process.kill()
            process.join()
    return int(failed)


if __name__ == "__main__":
    name, count, place, limit, *others = sys.argv[1:]
    sys.exit(main(name, int(count), Path(place), float(limit), others))
