"""Commands and scripts in processes of their own that start with torch and transformers already imported.

Importing these two takes half the time of a short command. A server that has imported them forks one process for each
command; that process imports graftc itself and has its own environment, folder, arguments and output. Tests of the
interpreter's start-up run a new interpreter instead (`tests.cli.support.run_apart`).
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import sys
import tempfile
from collections.abc import Mapping
from multiprocessing import forkserver
from pathlib import Path

from tests.kit.places import ROOT

PRELOADED = "tests.kit.preloaded"
SEED = "1"
"""Of the server's hashes, which are therefore others than those of this process, whose own are random."""
TIME = 300
"""Seconds that one may take."""

spent = 0.0
"""Processor seconds of all that ran here, not as children of this process, which therefore does not count them."""

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload([PRELOADED])


def output(code: str, *arguments: str, **environment: str) -> str:
    """Return what Python code prints when it runs in a process and a folder of its own."""
    with tempfile.TemporaryDirectory() as folder:
        (script, out, err) = (Path(folder, name) for name in ("script.py", "out", "err"))
        script.write_text(code, encoding="utf-8")
        status = run(str(script), *arguments, cwd=Path(folder), out=out, err=err, environment=environment)
        assert status == 0, err.read_text(encoding="utf-8")
        return out.read_text(encoding="utf-8")


def run(
    program: str, *arguments: str, cwd: Path, out: str | Path, err: str | Path, environment: Mapping[str, str]
) -> int:
    """Run a program that writes to two files and return its status.

    Args:
        program: a module, run as ``python -m`` does, or the path of a script.
        arguments: the program's arguments.
        cwd: the working directory.
        out, err: the targets of its standard output and its standard error, files or terminals.
        environment: variables set in addition to this process's own.
    """
    one = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    values = {**os.environ, "HF_HUB_OFFLINE": "1", **one, **environment}
    global spent
    _start()
    with tempfile.TemporaryDirectory() as folder:
        took = Path(folder, "seconds")
        texts = [str(cwd), str(out), str(err), str(took)]
        process = _CONTEXT.Process(target=_started, args=(program, arguments, *texts, values))
        process.start()
        process.join(TIME)
        if process.exitcode is None:
            process.kill()
            raise AssertionError(f"{program} {' '.join(arguments)} is not done after {TIME} s")
        spent += float(took.read_text(encoding="utf-8")) if took.is_file() else 0.0
    return process.exitcode


def _start() -> None:
    """Start the server unless it is running."""
    before = os.environ.get("PYTHONHASHSEED")
    os.environ["PYTHONHASHSEED"] = SEED
    try:
        forkserver.ensure_running()
    finally:
        os.environ.pop("PYTHONHASHSEED")
        if before is not None:
            os.environ["PYTHONHASHSEED"] = before


def _started(
    program: str, arguments: tuple[str, ...], cwd: str, out: str, err: str, took: str, environment: dict[str, str]
) -> None:
    """Run the program in the new process."""
    graftc = [name for name in sys.modules if name.partition(".")[0] in ("graftc", "rich", "typer", "click")]
    assert not graftc, f"they read the environment when they are imported: {graftc}"
    for number, path in ((1, out), (2, err)):
        opened = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOCTTY, 0o644)
        os.dup2(opened, number)
    sys.stdout, sys.stderr = (open(n, "w", encoding="utf-8", closefd=False) for n in (1, 2))  # noqa: SIM115
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    script = program.endswith(".py")
    sys.argv = [program, *arguments]
    paths = environment.get("PYTHONPATH", "").split(os.pathsep)
    sys.path[:0] = [str(Path(program).parent) if script else cwd, *filter(None, paths), str(ROOT)]
    try:
        if script:
            runpy.run_path(program, run_name="__main__")
        else:
            runpy.run_module(program, run_name="__main__", alter_sys=True)
    finally:
        Path(took).write_text(str(sum(os.times()[:4])), encoding="utf-8")
