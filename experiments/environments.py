"""Environments that have other versions of some libraries, made when they are first needed."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock

from experiments.cells import ROOT, function_of

HIDDEN = ("bitsandbytes", "torchao")
"""Optional libraries that no environment sees: an old PEFT fails with a new torchao."""

FOLDER = ROOT / "build" / "experiments" / "environments"


def installed(names: Iterable[str]) -> dict[str, str]:
    """Return the versions of libraries in this environment, by their names."""
    return {name: importlib.metadata.version(name) for name in names}


def interpreter(versions: Mapping[str, str], folder: Path = FOLDER) -> Path:
    """Return the interpreter of an environment with these versions; this one's if it has them.

    Another environment is a virtual one in ``folder``, in which pip installs what differs. Everything else, PyTorch
    among it, is that of this environment, so that two environments differ in what is asked for and in what it requires.

    Raises:
        CalledProcessError: if pip cannot install the versions.
    """
    if installed(versions) == versions:
        return Path(sys.executable)
    requirements = [f"{name}=={version}" for name, version in sorted(versions.items())]
    place = folder / "-".join(requirements)
    python = place / "bin" / "python"
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "lock"):
        if not (place / "complete").exists():
            venv.create(place, with_pip=False, clear=True)
            own = sysconfig.get_path("purelib", vars={"base": str(place), "platbase": str(place)})
            # Read after the environment's own packages, which therefore come first.
            Path(own, "shared.pth").write_text(f"{sysconfig.get_path('purelib')}\n", encoding="utf-8")
            subprocess.run([str(python), "-m", "pip", "install", "-q", *requirements], check=True, stdout=sys.stderr)
            (place / "complete").touch()
    return python


def call(function: str, argument: Mapping[str, Any], versions: Mapping[str, str], folder: Path = FOLDER) -> Any:
    """Return what a function returns in an environment, as data.

    Args:
        function: ``module:function``; it takes and returns data.
        argument: its argument.
        versions: those of the environment.
        folder: where environments are made.

    Raises:
        RuntimeError: if the process fails, or has other versions than these.
    """
    python = interpreter(versions, folder)
    content = json.dumps({"function": function, "argument": argument, "versions": dict(versions)})
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [str(python), "-W", "ignore", "-m", "experiments.environments"]
    done = subprocess.run(command, input=content, capture_output=True, text=True, cwd=ROOT, env=environment)
    if done.returncode:
        raise RuntimeError(f"{python} ended with {done.returncode}: {done.stderr.strip()[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Read a call from standard input, and print its result as the last line."""
    sys.modules.update(dict.fromkeys(HIDDEN))  # type: ignore[arg-type]
    task = json.loads(sys.stdin.read())
    if (own := installed(task["versions"])) != task["versions"]:
        sys.exit(f"this environment has {own}, not {task['versions']}")
    print(json.dumps(function_of(task["function"])(task["argument"])))


if __name__ == "__main__":
    main()
