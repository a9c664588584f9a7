"""A process that saves, merges and exports in forks of itself, to be killed.

``python -m tests.artifact.worker FOLDER`` loads the artifact in FOLDER once. Then each line on its standard input is a
job and a number of seconds, ``none`` for as long as it takes; a fork does the job and is killed after that time. The
line that comes back is its status and how long it ran.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import graftc
from graftc.runtime.export.module import ExportModule


def jobs(folder: Path) -> dict[str, Callable[[], object]]:
    """What there is to do. Exporting is prepared, so that the time is that of writing and checking."""
    import graftc.runtime.export.onnx as onnx
    import graftc.runtime.export.pt2 as pt2

    compiled = graftc.load(folder / "artifact")
    merged = compiled.merge()
    module = ExportModule(merged, compiled.compilation.main)
    onnx.LARGE = 1024  # so that the weights go into a file of their own
    for exporter, name in ((onnx, "prepare_onnx"), (pt2, "prepare_pt2")):
        ready = getattr(exporter, name)(module, {"graftc.note": "prepared"})
        setattr(exporter, name, lambda module, metadata, ready=ready: ready)
    return {
        "save": lambda: compiled.save(folder / "out" / "saved"),
        "save over": lambda: compiled.save(folder / "out" / "saved", force=True),
        "merge": lambda: merged.save(folder / "out" / "merged"),
        "onnx": lambda: merged.export(folder / "out" / "m.onnx"),
        "onnx over": lambda: merged.export(folder / "out" / "m.onnx", force=True),
        "pt2": lambda: merged.export(folder / "out" / "m.pt2", format="pt2"),
    }


def run(job: Callable[[], object], seconds: float | None) -> tuple[int, float]:
    """The status of a fork that does a job and is killed after some seconds, and how long it ran."""
    started = time.perf_counter()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            job()
            status = 0
        finally:
            os._exit(status)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    _, code = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(code), time.perf_counter() - started


def main(folder: Path) -> None:
    """Serve jobs until the input ends."""
    known = jobs(folder)
    print("ready", flush=True)
    for line in sys.stdin:
        name, _, seconds = line.strip().rpartition(" ")
        status, took = run(known[name], None if seconds == "none" else float(seconds))
        print(status, took, flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
