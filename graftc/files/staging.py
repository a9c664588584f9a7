"""Staging folders: created, found again, finished or discarded, but never those of another user.

One is named ``.NAME.graftc-RANDOM`` after what is written in it. In a folder that several users may write to, any of
them can create one of such a name, with any content; and one may come out of an archive. So an existing one is used
only if it is this user's alone (`HeldFolder.is_private`), and work that is resumed checks what is in it.
"""

from __future__ import annotations

import contextlib
import errno
import json
import re
import secrets
import sys
from collections.abc import Iterator
from pathlib import Path

from graftc.files.commit import JOURNAL, NEW, finish
from graftc.files.held_folder import HeldFolder, is_own
from graftc.specs.errors.diagnostics import GraftError

_STAGING = re.compile(r"\..+\.graftc-[0-9a-f]{12}")
_RESUME = "resume.json"
_PRIVATE = 0o700
_ATTEMPTS = 100


@contextlib.contextmanager
def staging_folder(parent: HeldFolder, name: str, resume: str | None = None) -> Iterator[HeldFolder]:
    """Yield a locked staging folder, and remove it at the end with everything left in it.

    Args:
        parent: the folder that contains it.
        name: the name of what is written.
        resume: SHA-256 of the work, if it can be resumed.

    Raises:
        GraftError: GC063 if another process does the same work.
        OSError: if it cannot be created.
    """
    staging = _new(parent, name) if resume is None else _resumed(parent, name, resume)
    try:
        if not staging.is_folder(NEW):
            staging.make(NEW)
        if resume is not None and not staging.exists(_RESUME):
            staging.write(_RESUME, json.dumps({"work": resume}))
        yield staging
    finally:
        staging.remove_from(parent)
        staging.close()


def _new(parent: HeldFolder, name: str) -> HeldFolder:
    """Create a folder that no other process has, and return it locked."""
    for _ in range(_ATTEMPTS):
        inner = f".{name}.graftc-{secrets.token_hex(6)}"
        parent.make(inner, _PRIVATE)
        try:
            staging = _locked(parent, inner)
        except (BlockingIOError, FileNotFoundError):
            continue  # a run that cleans up here has found the folder before it was locked
        # Permissions are not checked, since some file systems have none.
        if staging.is_at_its_path() and is_own(staging.stat(), parent.path) and not staging.names():
            return staging
        staging.close()
    raise PermissionError(errno.EPERM, "another process removes what is created there", str(parent.path))


def _resumed(parent: HeldFolder, name: str, resume: str) -> HeldFolder:
    """Return the folder of work that can be resumed, as it was left or new.

    If another user has created it, or may write there, a new folder of another name is returned.
    """
    inner = _resumable(name, resume)
    while True:
        with contextlib.suppress(FileExistsError):
            parent.make(inner, _PRIVATE)
        try:
            staging = _locked(parent, inner)
        except FileNotFoundError:
            continue
        except BlockingIOError:
            message = f"another process is writing {parent.path / name}"
            raise GraftError("GC063", message, hint="wait until it is done, or choose another path") from None
        except OSError:
            if parent.is_folder(inner) and is_own(parent.stat(inner), parent.path):
                raise
            return _new(parent, name)  # a link, a file, or a folder that another user keeps closed
        if staging.is_at_its_path():
            if staging.is_private(links=False):
                return staging
            staging.close()
            return _new(parent, name)
        staging.close()


def _resumable(name: str, resume: str) -> str:
    return f".{name}.graftc-{resume[:12]}"


def _locked(parent: HeldFolder, name: str) -> HeldFolder:
    """Open a folder and lock it.

    Raises:
        BlockingIOError: if another process holds the lock.
        OSError: if it does not exist, is not a folder, or is a link.
    """
    staging = parent.inner(name)
    try:
        staging.lock()
    except BaseException:
        staging.close()
        raise
    return staging


def discard_others(parent: HeldFolder, name: str, resume: str | None) -> None:
    """Discard what killed runs of this user have left of other work that was to be put in the same place."""
    kept = None if resume is None else _resumable(name, resume)
    begin = f".{name}.graftc-"
    for inner in parent.names():
        if inner.startswith(begin) and inner != kept and _STAGING.fullmatch(inner):
            _sweep(parent, inner, resumable=True)


def recover(folder: Path) -> None:
    """Finish or discard what killed runs of this user have left in a folder.

    What cannot be repaired stays unchanged, and so does what belongs to other users or can be written by them.
    """
    with contextlib.suppress(OSError), HeldFolder.open(folder, follow=True) as parent:
        recover_in(parent)


def recover_in(parent: HeldFolder) -> None:
    """Finish or discard what killed runs of this user have left in an open folder.

    Raises:
        OSError: if its names cannot be read.
    """
    for name in parent.names():
        if _STAGING.fullmatch(name):
            _sweep(parent, name)


def _sweep(parent: HeldFolder, name: str, *, resumable: bool = False) -> None:
    """Finish what a staging folder of a killed run of this user has committed, and discard the rest.

    Args:
        parent: the folder that contains it.
        name: its name.
        resumable: whether to discard work that could be resumed as well.
    """
    if sys.platform == "win32":  # without locks, nothing tells whether the run has been killed
        return
    with contextlib.suppress(OSError), _locked(parent, name) as staging:
        waits = staging.is_file(_RESUME) and not staging.is_file(JOURNAL)
        if (waits and not resumable) or not staging.is_private():
            return
        with contextlib.suppress(OSError, ValueError):
            finish(staging, parent)
        staging.remove_from(parent)
