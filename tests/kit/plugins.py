"""Installed packages with methods, passes and exporters: by pip, or as a module with its metadata in a folder."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import invalidate_caches
from pathlib import Path

import pytest

from graftc.passes.core.added_passes import reload_passes
from graftc.runtime.export.registry import reload_exporters
from tests.kit.places import ROOT

Install = Callable[..., None]
"""Installs a package; see `installing`."""


def look_again() -> None:
    """Make graftc look up what is installed when it next needs it."""
    invalidate_caches()
    reload_passes()
    reload_exporters()


@contextmanager
def installing(folder: Path) -> Iterator[Install]:
    """Make packages installable under a folder while the block runs, and remove all of them afterwards.

    The yielded function takes the name of a distribution, the source of its module, and its entry points in a group:
    names, each with the object of the module that it refers to.
    """
    modules: list[str] = []

    def install(name: str, source: str, version: str = "1.0", group: str = "graftc.passes", **points: str) -> None:
        module = name.replace("-", "_")
        (folder / f"{module}.py").write_text(source, encoding="utf-8")
        info = folder / f"{module}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n", encoding="utf-8")
        lines = [f"{point} = {module}:{value}" for point, value in points.items()]
        (info / "entry_points.txt").write_text("\n".join([f"[{group}]", *lines, ""]), encoding="utf-8")
        modules.append(module)
        look_again()

    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        try:
            yield install
        finally:
            patch.undo()
            for module in modules:
                sys.modules.pop(module, None)
            look_again()


def pip_install(package: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Install a package without network, and return the ``PYTHONPATH`` of a process that has it beside this graftc."""
    target, source = tmp_path_factory.mktemp("site"), tmp_path_factory.mktemp("source") / package.name
    subprocess.run(["cp", "-r", str(package), str(source)], check=True)
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "--target", str(target), str(source)], check=True)
    return os.pathsep.join([str(target), str(ROOT)])
