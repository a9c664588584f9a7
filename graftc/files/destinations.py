"""Checks of destinations: whether a path may be written, and what writing would replace. Does not import torch."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import stat
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from graftc.files.held_folder import foreign_folder
from graftc.specs.errors.diagnostics import GraftError
from graftc.specs.errors.text import quoted

SEALED: Mapping[str, str] = MappingProxyType({"manifest.json": "artifact", "graftc.json": "merged"})
"""Files that list all other files in their folder, each with the kind of folder that it declares."""

CARD = "README.md"
"""The file of a merged model's folder that the folder's list leaves out, so that its owner can add and edit it."""

_MOST = 64 * 2**20


def check_destination(
    path: Path,
    *,
    force: bool = False,
    companions: Sequence[str] = (),
    replaceable: Callable[[Path], bool] = Path.is_file,
) -> None:
    """Refuse early any destination that `staged` would refuse after the work is done.

    A folder that contains another user's folder is never replaced.

    Raises:
        GraftError: GC063 for a destination that may not be replaced or added to; GC064 for an impossible path.
    """
    check_path(path)
    _check_sealed(path)
    for taken in (path, *(path.with_name(name) for name in companions)):
        if not os.path.lexists(taken):
            continue
        file = replaceable is Path.is_file or taken != path
        if (kind := _kind(taken)) not in ("a folder", "a file") or (file and kind == "a folder"):
            message = f"{taken} is {kind}, and cannot be replaced with a {'file' if file else 'folder'}"
            raise GraftError("GC063", message, hint="choose another path")
        if not force:
            raise GraftError(
                "GC063", f"{taken} exists", hint="choose another path, or replace it with --force or force=True"
            )
        if taken.is_symlink():
            continue
        if taken.is_dir() and (other := _foreign(taken)) is not None:
            hint = "choose another path, or let its owner remove it"
            raise GraftError("GC063", f"{other} belongs to another user, so it is not replaced", hint=hint)
        if replaceable(taken) if taken == path else taken.is_file():
            continue
        what = "a folder that graftc did not write" if taken.is_dir() else "a file, not a folder that graftc wrote"
        raise GraftError("GC063", f"{taken} is {what}, so it is not replaced", hint="choose another path or remove it")


def _kind(path: Path) -> str:
    """Return what a path is; a link counts as what it leads to, and as a file if that does not exist."""
    try:
        mode = path.stat().st_mode
    except OSError:
        return "a file"
    kinds = {stat.S_IFREG: "a file", stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
    return kinds.get(stat.S_IFMT(mode), "a device")


def check_path(path: Path) -> None:
    """Refuse a path that cannot exist, or that other tools could not name.

    Raises:
        GraftError: GC064.
    """
    text, reason = str(path), None
    if "\0" in text:
        reason = "it contains a NUL character"
    elif _HALF.search(text):
        reason = "it is not Unicode text"
    elif too_long := [part for part in path.parts if len(os.fsencode(part)) > _LONGEST_NAME]:
        reason = f"a name of {len(os.fsencode(too_long[0]))} bytes is too long"
    if reason is not None:
        raise GraftError("GC064", f"{quoted(text)} cannot be written: {reason}", hint="choose another path")


_HALF = re.compile("[\ud800-\udbff]|[\udc00-\udc7f]|[\udd00-\udfff]")
"""Surrogates other than those with which Python represents bytes that are not text, which a path may contain."""
_LONGEST_NAME = 255


def _foreign(folder: Path) -> Path | None:
    try:
        return foreign_folder(folder)
    except OSError as error:
        raise cannot_write(folder, error) from error


def _check_sealed(path: Path) -> None:
    """Refuse a destination in a folder whose files are all listed: another file would make the folder unreadable.

    The card of a merged model is not refused.
    """
    inner = Path(os.path.realpath(path.parent))
    for folder in (inner, *inner.parents):
        for name, kind in SEALED.items():
            free = kind == "merged" and folder == inner and path.name == CARD
            if not free and _says(folder / name, kind):
                what = "an artifact" if kind == "artifact" else "a merged model"
                message = f"{path} is in {folder}, which is {what}: another file in it would make it unreadable"
                raise GraftError("GC063", message, hint="write to a folder beside it")


def _says(file: Path, kind: str) -> bool:
    try:
        if not file.is_file() or file.stat().st_size > _MOST:
            return False
        return re.search(rf'"{kind}":\s*"graftc"'.encode(), file.read_bytes()) is not None
    except OSError:  # an artifact with such a file cannot be read either
        return False


def check_folder(path: Path, mark: str) -> None:
    """Refuse early a folder that cannot be created, or that is not empty but lacks the file that marks it.

    Args:
        path: the folder, which need not exist.
        mark: the name of the file that identifies the folder.

    Raises:
        GraftError: GC063 if the path is not a folder or contains other files; GC064 if it cannot be created.
    """
    check_path(path)
    try:
        if not os.path.isdir(path):
            _check_makeable(path)
            return
        # The remains of a killed write of the mark do not count as other content.
        others = [name for name in os.listdir(path) if not name.startswith(f".{mark}.graftc-")]
    except OSError as error:
        raise cannot_write(path, error) from error
    if others and mark not in others:
        message = f"{path} contains other files, but no {mark}"
        raise GraftError("GC063", message, hint="choose a new folder, or an empty one")


def _check_makeable(path: Path) -> None:
    try:
        os.lstat(path)
    except FileNotFoundError:
        pass
    else:
        what = "is a dangling link" if os.path.islink(path) else "exists, but is not a folder"
        raise GraftError("GC063", f"{path} {what}", hint="choose another path or remove it")
    path = path.absolute()
    above = path.parent
    while not os.path.lexists(above):
        above = above.parent
    for name in path.relative_to(above).parts:  # only the file system can tell whether a name is too long
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            os.lstat(above / name)
    if not os.path.isdir(above):
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(above))
    if not os.access(above, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(above))


def check_apart(path: Path, *sources: str | Path | None) -> None:
    """Refuse a destination that is one of the sources, is inside one, or contains one; links are followed.

    Args:
        path: the destination.
        sources: files and folders that are read; anything else, such as a hub id, is ignored.

    Raises:
        GraftError: GC063; GC064 for an impossible path.
    """
    check_path(path)
    for source in sources:
        if source is None or not os.path.lexists(existing := Path(source).expanduser()):
            continue
        if holds(path, existing) or (existing.is_dir() and holds(existing, path)):
            raise overlap(path, source)


def holds(folder: Path, path: Path) -> bool:
    """Return whether a path is the folder or something in it, after following links."""
    outer, inner = (Path(os.path.realpath(p)) for p in (folder, path))
    return inner.is_relative_to(outer)


def overlap(path: Path, source: str | Path) -> GraftError:
    where = "is" if os.path.realpath(path) == os.path.realpath(source) else "overlaps"
    return GraftError("GC063", f"{path} {where} {source}, one of its sources", hint="write to a folder beside it")


def cannot_write(path: Path, error: OSError) -> GraftError:
    """Return the error for a write that the system refuses."""
    if error.errno in (errno.EEXIST, errno.ENOTEMPTY):
        hint = "another process has written it; replace it with --force or force=True"
        return GraftError("GC063", f"{path} has been created in the meantime", hint=hint)
    hints = {
        errno.ENOSPC: "the disk is full: make room or choose another disk",
        errno.EDQUOT: "the quota is used up: make room or choose another disk",
        errno.EACCES: "choose a folder that you may write to",
        errno.EROFS: "the file system is read-only: choose another folder",
        errno.ENOTDIR: "part of the path is a file: choose another path",
    }
    reason = error.strerror or str(error)
    return GraftError("GC064", f"{path} cannot be written: {reason}", hint=hints.get(error.errno or 0))
