"""Make environments from empty, and reuse them until their requirements change."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tools.matrix.environments import Environment, Project, constraints, required, targets
from tools.sources import ROOT

FOLDER = ROOT / "build" / "matrix"
ROOM = 12e9
"""Bytes that must be free to make an environment: a CUDA build of PyTorch takes most of them."""

_STAMP = "graftc-matrix.json"
_PROBE = "import ensurepip, sys, venv; print('.'.join(map(str, sys.version_info[:3])))"
_INSTALLED = (
    "import importlib.metadata as m, json; print(json.dumps({d.name.lower(): d.version for d in m.distributions()}))"
)


class MatrixError(Exception):
    """A problem that the user can fix: a missing interpreter, a full disk, or packages that conflict."""


@dataclass(frozen=True)
class Interpreter:
    """A Python interpreter, and its version."""

    path: Path
    version: str


@dataclass(frozen=True)
class ReadyEnvironment:
    """An environment that is installed.

    Attributes:
        environment: its description.
        folder: where it is.
        versions: the versions of all distributions in it, and that of Python, by name.
        bytes: its size on disk.
    """

    environment: Environment
    folder: Path
    versions: Mapping[str, str]
    bytes: int

    @property
    def bin(self) -> Path:
        """The folder of its commands."""
        return self.folder / "bin"

    @property
    def python(self) -> Path:
        """Its interpreter."""
        return self.bin / "python"

    def variables(self, more: Mapping[str, str]) -> dict[str, str]:
        """Return the variables for a process in it, without those that lead to modules elsewhere."""
        inherited = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
        path = os.pathsep.join([str(self.bin), os.environ.get("PATH", os.defpath)])
        return {**inherited, "PATH": path, "VIRTUAL_ENV": str(self.folder), **more}


def find_interpreter(
    version: str, interpreters: Mapping[str, str] | None = None, path: str | None = None, own: str = sys.executable
) -> Interpreter:
    """Return a Python of a version that can make virtual environments.

    Args:
        version: as in ``3.13``; any version if it is empty.
        interpreters: paths of interpreters by version, which come before all others.
        path: the folders to look in, by default those of ``PATH``.
        own: an interpreter that is used if it has the version.

    Raises:
        MatrixError: if there is none; the message lists the interpreters that do not fit.
    """
    interpreters = interpreters or {}
    folders = (os.environ.get("PATH", "") if path is None else path).split(os.pathsep)
    on_path = [os.path.join(folder, f"python{version}") for folder in folders if folder] if version else []
    candidates = [interpreters[version]] if version in interpreters else [own, *dict.fromkeys(on_path)]
    unsuitable = []
    for candidate in candidates:
        if not os.access(candidate, os.X_OK):
            unsuitable += [f"{candidate} is not there"] if version in interpreters else []
            continue
        done = subprocess.run([candidate, "-c", _PROBE], capture_output=True, text=True, check=False)
        candidate_version = done.stdout.strip()
        if done.returncode:
            unsuitable.append(f"{candidate} fails: {(done.stderr.strip() or 'no message').splitlines()[-1]}")
        elif version and candidate_version.split(".")[:2] != version.split("."):
            unsuitable += [f"{candidate} is Python {candidate_version}"] if version in interpreters else []
        else:
            return Interpreter(Path(candidate), candidate_version)
    raise MatrixError(
        "\n  ".join(
            [
                f"no Python {version} with venv and ensurepip: install it (on Debian and Ubuntu: apt-get install "
                f"python{version}-venv), or name it with --python {version}=PATH (make: PYTHONS={version}=PATH)",
                *unsuitable,
            ]
        )
    )


def build_wheel(folder: Path = FOLDER / "wheel") -> Path:
    """Build graftc's wheel from the checkout, without network, and return its path.

    Raises:
        CalledProcessError: if it cannot be built.
    """
    shutil.rmtree(folder, ignore_errors=True)
    offline = ["--no-index", "--no-deps", "--no-build-isolation"]
    subprocess.run([sys.executable, "-m", "pip", "wheel", "-q", *offline, "-w", str(folder), str(ROOT)], check=True)
    (wheel,) = folder.glob("*.whl")
    return wheel


def digest(environment: Environment, project: Project, interpreter: Interpreter) -> str:
    """Return a digest of an environment's Python and requirements; graftc's own code is not part of it."""
    requirements = sorted(map(str, required(environment, project)))
    content = [interpreter.version, requirements, constraints(environment, project), project.bare]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def make_environment(
    environment: Environment,
    project: Project,
    interpreter: Interpreter,
    wheel: Path,
    folder: Path = FOLDER,
    fresh: bool = False,
) -> ReadyEnvironment:
    """Return an environment with a wheel of graftc, made from empty unless it is installed already.

    Args:
        environment: its description.
        project: the requirements of graftc.
        interpreter: the Python with which it is made.
        wheel: the wheel; an environment that is kept gets it as well.
        folder: where environments are.
        fresh: whether to make it again even if nothing changed, for instance to get newer releases.

    Raises:
        MatrixError: if the disk has too little space, or pip fails.
    """
    place, log = folder / environment.name, folder / f"{environment.name}.pip.txt"
    wanted = digest(environment, project, interpreter)
    pip = [str(place / "bin" / "python"), "-m", "pip", "install", "--disable-pip-version-check"]
    if fresh or _stored(place).get("digest") != wanted:
        shutil.rmtree(place, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
        if (free := shutil.disk_usage(folder).free) < ROOM:
            raise MatrixError(f"{folder} has {free / 1e9:.0f} GB left, and an environment needs {ROOM / 1e9:.0f}")
        print(f"{environment.name}: making it in {place} with Python {interpreter.version}; see {log}", flush=True)
        start = time.monotonic()
        bounds = folder / f"{environment.name}.constraints.txt"
        bounds.write_text("".join(f"{line}\n" for line in constraints(environment, project)), encoding="utf-8")
        log.unlink(missing_ok=True)
        _run([str(interpreter.path), "-m", "venv", str(place)], log)
        _run([*pip, "-c", str(bounds), *targets(environment, project, wheel)], log)
        _run([*pip, "--no-deps", *project.bare], log)
        stored = {"digest": wanted, "minutes": round((time.monotonic() - start) / 60, 1)}
        (place / _STAMP).write_text(json.dumps(stored) + "\n", encoding="utf-8")
    else:
        _run([*pip, "--no-index", "--no-deps", "--force-reinstall", str(wheel)], log)
    installed = subprocess.check_output([str(place / "bin" / "python"), "-I", "-c", _INSTALLED], text=True)
    return ReadyEnvironment(environment, place, {"python": interpreter.version, **json.loads(installed)}, _size(place))


def _stored(place: Path) -> dict[str, Any]:
    """Return the content of an environment's stamp; empty if the environment was never completed."""
    try:
        stored: dict[str, Any] = json.loads((place / _STAMP).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return stored


def _run(command: Sequence[str], log: Path) -> None:
    with log.open("a", encoding="utf-8") as file:
        print("$", *command, file=file, flush=True)
        status = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, cwd=log.parent, check=False).returncode
    if status:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
        said = "\n  ".join([f"{command[0]} {command[2]} ended with status {status}; {log} ends:", *lines[-12:]])
        raise MatrixError(said)


def _size(folder: Path) -> int:
    """Return the bytes that the files of a folder take on disk."""
    return sum(path.lstat().st_blocks * 512 for path in folder.rglob("*") if not path.is_dir() or path.is_symlink())
