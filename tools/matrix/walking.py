"""Run the scripts of `tools.matrix.walks` where nothing of the checkout can be imported: with the wheel alone."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from tools.docs import blocks
from tools.matrix.environments import Environment
from tools.matrix.making import FOLDER, ReadyEnvironment
from tools.matrix.walks import EXTRAS, Code, Page, Script, Shell, Step
from tools.sources import ROOT

SECONDS = 3600
"""The time limit of a step, in seconds."""
_WHERE = "import graftc; print(graftc.__file__)"


@dataclass(frozen=True)
class Walked:
    """The outcome of a script.

    Attributes:
        script: its name.
        wrong: what went wrong, with the page and the line; empty if nothing did.
        left_out: the pages that need a package which the environment leaves out, each with the reason.
        seconds: how long it took.
        log: the file with its output.
    """

    script: str
    wrong: str
    left_out: Mapping[str, str]
    seconds: float
    log: Path


def environment_of(script: Script, base: Environment) -> Environment:
    """Return the environment of a script: graftc's wheel with the extras that a user would install.

    Scripts with the same extras share it.

    Args:
        script: the script.
        base: the environment that determines its Python and its lowest versions.
    """
    extras = tuple(sorted({*EXTRAS, *script.extras}))
    name = "-".join([f"walk-{base.name}", *sorted({*script.extras} - {*EXTRAS})])
    return replace(base, name=name, extras=extras)


def walk(script: Script, ready: ReadyEnvironment, folder: Path = FOLDER / "walks", root: Path = ROOT) -> Walked:
    """Run a script in an empty folder, and stop at the first step that is wrong.

    Args:
        script: the script.
        ready: the environment.
        folder: where the script gets a folder of its own, and its log.
        root: the folder of the pages.
    """
    place, log = folder / script.name, folder / f"{script.name}.txt"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    log.unlink(missing_ok=True)
    # Captures of earlier runs are not used.
    variables = ready.variables({"HF_HUB_OFFLINE": "1", "GRAFTC_CACHE": str(folder / f"{script.name}.cache")})
    shutil.rmtree(variables["GRAFTC_CACHE"], ignore_errors=True)
    start = time.monotonic()
    wrong = _not_the_wheel(ready, place, variables)
    left_out = dict(_left_out(script, ready.environment))
    for step in () if wrong else script.steps:
        if str(step) not in left_out and (wrong := _step(step, ready, place, variables, log, root)):
            break
    return Walked(script.name, wrong, left_out, time.monotonic() - start, log)


def _left_out(script: Script, environment: Environment) -> Iterator[tuple[str, str]]:
    """Yield the pages that an environment cannot run, each with the reason."""
    for step in script.steps:
        for package in step.needs if isinstance(step, Page) else ():
            if package in environment.without:
                yield str(step), f"without {package}: {environment.without[package]}"


def _not_the_wheel(ready: ReadyEnvironment, place: Path, variables: Mapping[str, str]) -> str:
    """Return what is wrong with the graftc that scripts import, if it is not the environment's own."""
    command = [str(ready.python), "-c", _WHERE]
    done = subprocess.run(command, cwd=place, env=variables, capture_output=True, text=True, check=False)
    own = Path(done.stdout.strip() or os.devnull).resolve().is_relative_to(ready.folder.resolve())
    return "" if own else f"graftc is not that of {ready.folder}: {done.stdout}{done.stderr}".strip()


def _step(step: Step, ready: ReadyEnvironment, place: Path, variables: Mapping[str, str], log: Path, root: Path) -> str:
    """Run a step, and return what went wrong."""
    command: list[str]
    message_file = place.with_name(f"{place.name}.wrong.txt")
    message_file.unlink(missing_ok=True)
    match step:
        case Shell(line):
            command = ["sh", "-c", line]
        case Code(_, text):
            command = [str(ready.python), "-P", "-c", text]
        case Page(path, first):
            if not (root / path).is_file():
                return f"{path} is missing"
            # -P: the folder of this file, which is one of the checkout, is not searched for modules.
            command = [str(ready.python), "-P", blocks.__file__, str(root / path)]
            command += ["--root", str(root), "--wrong", str(message_file), *(["--first", first] if first else [])]
    with log.open("a", encoding="utf-8") as file:
        print(f"==== {step}", file=file, flush=True)
        try:
            status = subprocess.run(
                command, cwd=place, env=variables, stdout=file, stderr=subprocess.STDOUT, timeout=SECONDS, check=False
            ).returncode
        except subprocess.TimeoutExpired:
            return f"{step} took more than {SECONDS} s"
    if status and message_file.is_file():
        return message_file.read_text(encoding="utf-8")
    return f"{step} ended with status {status}" if status else ""
