"""Destinations: what may be written to, and what would be overwritten. No torch."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from graftc.specs.errors.diagnostics import GraftError

__all__ = ["check_apart", "check_destination", "holds", "only_files", "overlap"]


def only_files(path: Path) -> bool:
    """What ``force`` may replace unless it is told otherwise."""
    return path.is_file()


def check_destination(
    path: Path,
    *,
    force: bool = False,
    companions: Sequence[str] = (),
    replaceable: Callable[[Path], bool] = only_files,
) -> None:
    """Refuse early what `staged` would refuse after the work is done.

    Raises:
        GraftError: GC063.
    """
    for taken in (path, *(path.with_name(name) for name in companions)):
        if not os.path.lexists(taken):
            continue
        if not force:
            raise GraftError(
                "GC063", f"{taken} exists", hint="choose another path, or replace it: --force, or force=True"
            )
        if taken.is_symlink() or (replaceable(taken) if taken == path else taken.is_file()):
            continue
        what = "a folder that graftc did not write" if taken.is_dir() else "no folder that graftc wrote"
        raise GraftError("GC063", f"{taken} is {what}, so it is not replaced", hint="choose another path or remove it")


def check_apart(path: Path, *sources: str | Path | None) -> None:
    """Refuse a destination that is what is being read, in it, or a folder above it; links are followed.

    Args:
        path: the destination.
        sources: files and folders that are read; what is none of those here, such as a hub id, is passed over.

    Raises:
        GraftError: GC063.
    """
    for source in sources:
        if source is None or not os.path.lexists(found := Path(source).expanduser()):
            continue
        if holds(path, found) or (found.is_dir() and holds(found, path)):
            raise overlap(path, source)


def holds(folder: Path, path: Path) -> bool:
    """Whether a path is a folder or something in it, wherever links lead."""
    outer, inner = (Path(os.path.realpath(p)) for p in (folder, path))
    return inner.is_relative_to(outer)


def overlap(path: Path, source: str | Path) -> GraftError:
    where = "is" if os.path.realpath(path) == os.path.realpath(source) else "overlaps"
    message = f"{path} {where} {source}, which is read for it"
    return GraftError("GC063", message, hint="write to a folder beside it")
