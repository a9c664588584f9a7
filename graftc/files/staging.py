"""Create, resume, finish or discard staging folders, but never those of another user.

A staging folder is named ``.NAME.graftc-RANDOM`` after the destination. In a folder that several users may write to,
any of them can create a folder with such a name and any contents; an archive may also contain one. An existing folder
is therefore used only if it belongs to this user alone (`HeldFolder.is_private`), and resumed work checks its contents.
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
    """Yield a locked staging folder, and finally remove it with everything left in it.

    Args:
        parent: the folder that contains it.
        name: the name of the destination.
        resume: SHA-256 of the work, if it can be resumed.

    Raises:
        GraftError: GC063 if another process is doing the same work.
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
    """Create a folder that no other process uses, and return it locked."""
    for _ in range(_ATTEMPTS):
        inner = f".{name}.graftc-{secrets.token_hex(6)}"
        parent.make(inner, _PRIVATE)
        try:
            staging = _locked(parent, inner)
        except (BlockingIOError, FileNotFoundError):
            continue  # another run was cleaning up here and found the folder before it was locked
        # Permissions are not checked, since some file systems do not support them.
        if staging.is_at_its_path() and is_own(staging.stat(), parent.path) and not staging.names():
            return staging
        staging.close()
    raise PermissionError(errno.EPERM, "another process removes folders that are created there", str(parent.path))


def _resumed(parent: HeldFolder, name: str, resume: str) -> HeldFolder:
    """Return the folder for resumable work, either as it was left or newly created.

    If another user created it or may write to it, a new folder with another name is returned.
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
    """Discard the remains of this user's killed runs that were doing other work for the same destination."""
    kept = None if resume is None else _resumable(name, resume)
    begin = f".{name}.graftc-"
    for inner in parent.names():
        if inner.startswith(begin) and inner != kept and _STAGING.fullmatch(inner):
            _sweep(parent, inner, resumable=True)


def recover(folder: Path) -> None:
    """Finish or discard the work that this user's killed runs have left in a folder.

    Remains that cannot be repaired are left unchanged, as are those that belong to other users or are writable by them.
    """
    with contextlib.suppress(OSError), HeldFolder.open(folder, follow=True) as parent:
        recover_in(parent)


def recover_in(parent: HeldFolder) -> None:
    """Finish or discard the work that this user's killed runs have left in an open folder.

    Raises:
        OSError: if its names cannot be read.
    """
    for name in parent.names():
        if _STAGING.fullmatch(name):
            _sweep(parent, name)


def _sweep(parent: HeldFolder, name: str, *, resumable: bool = False) -> None:
    """Finish the committed work in a staging folder that a killed run of this user left, and discard the rest.

    Args:
        parent: the folder that contains it.
        name: its name.
        resumable: whether to also discard work that could be resumed.
    """
    if sys.platform == "win32":  # without locks, there is no way to know whether the run was killed
        return
    with contextlib.suppress(OSError), _locked(parent, name) as staging:
        waits = staging.is_file(_RESUME) and not staging.is_file(JOURNAL)
        if (waits and not resumable) or not staging.is_private():
            return
        with contextlib.suppress(OSError, ValueError):
            finish(staging, parent)
        staging.remove_from(parent)
