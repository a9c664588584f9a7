"""Installed packages with passes: a module and its metadata in a folder of the import path."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import invalidate_caches
from pathlib import Path

import pytest

from graftc.passes.core.added_passes import reload_passes

Install = Callable[..., None]
"""Installs a package; see `installing`."""


@contextmanager
def installing(folder: Path) -> Iterator[Install]:
    """Make packages installable under a folder while the block runs, and remove all of them afterwards.

    The yielded function takes the name of a distribution, the source of its module, and its entry points: names, each
    with the object of the module that it refers to.
    """
    modules: list[str] = []

    def install(name: str, source: str, version: str = "1.0", **points: str) -> None:
        module = name.replace("-", "_")
        (folder / f"{module}.py").write_text(source, encoding="utf-8")
        info = folder / f"{module}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n", encoding="utf-8")
        lines = [f"{point} = {module}:{value}" for point, value in points.items()]
        (info / "entry_points.txt").write_text("\n".join(["[graftc.passes]", *lines, ""]), encoding="utf-8")
        modules.append(module)
        invalidate_caches()
        reload_passes()

    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        try:
            yield install
        finally:
            patch.undo()
            for module in modules:
                sys.modules.pop(module, None)
            invalidate_caches()
            reload_passes()
