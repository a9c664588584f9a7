"""The versions and the code that write a folder."""

from __future__ import annotations

import hashlib
import platform
from functools import cache
from pathlib import Path

import torch

from graftc.runtime.artifact.manifest import Versions
from graftc.version import __version__


def versions() -> dict[str, str]:
    """Return the current versions of graftc, Python, torch and transformers."""
    import transformers

    return {
        "graftc": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def are_installed(written: Versions) -> bool:
    """Return whether the current versions are those that wrote a folder, whatever their code."""
    return written.model_dump(exclude={"code"}) == versions()


@cache
def code_digest() -> str:
    """Return the SHA-256 of graftc's code: of one line for each Python file, its path and its SHA-256, sorted."""
    package = Path(__file__).parents[2]
    lines = (
        f"{path.relative_to(package).as_posix()} {hashlib.sha256(path.read_bytes()).hexdigest()}\n"
        for path in package.rglob("*.py")
    )
    return hashlib.sha256("".join(sorted(lines)).encode()).hexdigest()


def origin() -> dict[str, str]:
    """Return the entry for the versions and the code that write a folder now."""
    return {**versions(), "code": code_digest()}
