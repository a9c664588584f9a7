"""A copy of the sources and tests, in which files are changed and tests run."""

from __future__ import annotations

import os
import py_compile
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from tools.makefile import variables_for_tests
from tools.mutants.areas import ROOT

_WITHOUT = frozenset({".git", "build", "__pycache__", ".venv", ".venv-vllm", ".venv-axolotl"})


class Tree:
    """A copy of a folder, under ``build`` of the same.

    Byte code in it is valid by the digest of its source, not by its time, and processes that run in it write none: what
    was compiled from a changed file is never used for another.
    """

    def __init__(self, root: Path, folder: Path) -> None:
        self.root = root
        self.folder = folder

    def update(self) -> None:
        """Make the copy equal to the folder it is of: files that git has or would add, or all if there is no git."""
        names = self._names()
        for path in names:
            source, copy = self.root / path, self.folder / path
            data = source.read_bytes()
            if not copy.is_file() or copy.read_bytes() != data:
                copy.parent.mkdir(parents=True, exist_ok=True)
                copy.write_bytes(data)
                if path.endswith(".py"):
                    _compile(copy)
        for copy in list(self.folder.rglob("*")):
            inside = copy.relative_to(self.folder)
            if copy.is_file() and not _WITHOUT.intersection(inside.parts) and inside.as_posix() not in names:
                copy.unlink()

    def _names(self) -> set[str]:
        if (self.root / ".git").exists():
            command = ["git", "-C", str(self.root), "ls-files", "-coz", "--exclude-standard"]
            listed = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split("\0")
            return {name for name in listed if name and (self.root / name).is_file()}
        inside = ((path, path.relative_to(self.root)) for path in self.root.rglob("*"))
        return {path.as_posix() for full, path in inside if full.is_file() and not _WITHOUT.intersection(path.parts)}

    @contextmanager
    def changed(self, path: str, text: str) -> Iterator[None]:
        """Have another text in one file of the copy while the block runs."""
        copy = self.folder / path
        before = copy.read_bytes()
        copy.write_text(text, encoding="utf-8")
        try:
            yield
        finally:
            copy.write_bytes(before)

    def environment(self, more: Mapping[str, str]) -> dict[str, str]:
        """Return the variables of a process that runs tests in the copy."""
        paths = [str(self.folder), str(ROOT), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
        fixed = {
            "PYTHONPATH": os.pathsep.join(path for path in paths if path != "."),
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        return {**os.environ, **variables_for_tests(), **fixed, **more}


def _compile(path: Path) -> None:
    """Write byte code that is valid as long as the source's digest is the same."""
    with suppress(py_compile.PyCompileError):  # files of tests may be wrong on purpose
        py_compile.compile(str(path), invalidation_mode=py_compile.PycInvalidationMode.CHECKED_HASH, doraise=True)
