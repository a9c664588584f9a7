"""Writing files and folders so that a destination is absent or complete, whatever happens on the way.

What is written goes into a *staging folder* beside the destination, ``.NAME.graftc-RANDOM``: first ``new/NAME`` (and
files that belong to it), then, when all of it is on the disk, a journal ``commit.json``. From there on the write
counts as done: what is left is renaming, which the next run finishes if this one is killed. A staging folder without a
journal is thrown away by the next run. The process that owns one holds a lock on it, which ends with the process.

Work that takes long can be *resumed*: its staging folder is named after what is done, and holds a note ``resume.json``.
If the process is killed it stays, until the same work goes on in it or other work is to be put in the same place.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import glob
import json
import os
import re
import secrets
import shutil
import stat
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from graftc.runtime.destinations import (
    cannot_write,
    check_apart,
    check_destination,
    check_folder,
    holds,
    only_files,
    overlap,
)
from graftc.specs.errors.diagnostics import GraftError

if sys.platform != "win32":
    import fcntl

__all__ = ["check_apart", "check_destination", "check_folder", "recover", "staged", "write_text"]

_STAGING = re.compile(r"\..+\.graftc-[0-9a-f]{12}")
_NEW, _OLD, _JOURNAL, _RESUME = "new", "old", "commit.json", "resume.json"


@contextlib.contextmanager
def staged(
    path: Path,
    *,
    force: bool = False,
    companions: Sequence[str] = (),
    replaceable: Callable[[Path], bool] = only_files,
    sources: Iterable[str | Path | None] = (),
    resume: str | None = None,
    keep_modes: bool = False,
) -> Iterator[Path]:
    """A path of the same name to write a file or a folder to; it is put in place when the block ends well.

    Args:
        path: the destination. Folders above it are made where they are missing.
        force: replace what is there. A link is replaced itself, never what it points to.
        companions: names of files that may be written beside the destination and belong to it.
        replaceable: whether ``force`` may replace what is there; by default files only.
        sources: what is still read while this is written: replacing it or a folder above it is refused.
        resume: SHA-256 of all that determines what is written. What a killed run of the same has left is there again;
            the folder that holds what is yielded is for notes about it.
        keep_modes: files keep the permissions that they are given; by default they get those of new files.

    Raises:
        GraftError: GC063 when something is there and may not be replaced, or another process is at the same work;
            GC064 when writing fails. The destination is as it was before then.
    """
    path = Path(os.path.abspath(path))
    check_destination(path, force=force, companions=companions, replaceable=replaceable)
    for source in sources:
        if source is not None and holds(path, Path(source)):
            raise overlap(path, source)
    made: list[Path] = []
    try:
        made = _make_parents(path.parent)
        recover(path.parent)
        check_destination(path, force=force, companions=companions, replaceable=replaceable)
        _discard_others(path, resume)
        with _staging(path, resume) as staging:
            yield staging / _NEW / path.name
            _commit(staging, path, companions, force, keep_modes)
        made = []
    except OSError as error:
        raise cannot_write(path, error) from error
    finally:
        for folder in made:
            with contextlib.suppress(OSError):
                folder.rmdir()


@contextlib.contextmanager
def staged_or_dropped(
    path: Path | None,
    name: str,
    *,
    force: bool = False,
    replaceable: Callable[[Path], bool] = only_files,
    sources: Iterable[str | Path | None] = (),
) -> Iterator[Path]:
    """`staged`; without a path, a place called ``name`` that is gone when the block ends: for what is only checked.

    Raises:
        GraftError: as `staged`.
    """
    if path is None:
        with tempfile.TemporaryDirectory() as place:
            yield Path(place) / name
        return
    with staged(path, force=force, replaceable=replaceable, sources=sources) as staging:
        yield staging


def write_text(path: Path, text: str, *, force: bool = False) -> Path:
    """Write a UTF-8 text file, whole or not at all.

    Raises:
        GraftError: as `staged`.
    """
    with staged(path, force=force) as file:
        file.write_text(text, encoding="utf-8")
    return path


def _make_parents(folder: Path) -> list[Path]:
    """Make the folders that are missing; they are returned, the innermost first."""
    missing = []
    while not folder.exists():
        missing.append(folder)
        folder = folder.parent
    made: list[Path] = []
    for step in reversed(missing):
        step.mkdir(exist_ok=True)
        made.insert(0, step)
    return made


# --- staging folders ---------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _staging(path: Path, resume: str | None = None) -> Iterator[Path]:
    """A locked staging folder; at the end it is gone with all that is left in it."""
    staging, lock = _locked_folder(path) if resume is None else _resumed_folder(path, resume)
    try:
        (staging / _NEW).mkdir(exist_ok=resume is not None)
        yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        _unlock(lock)


def _locked_folder(path: Path) -> tuple[Path, int | None]:
    while True:
        staging = path.with_name(f".{path.name}.graftc-{secrets.token_hex(6)}")
        staging.mkdir(mode=0o700)
        try:
            lock = _lock(staging)
        except (BlockingIOError, FileNotFoundError):
            continue  # a run that sweeps this folder has found it before it was locked
        except OSError:
            return staging, None  # a file system without locks: nobody sweeps there either
        if staging.exists():
            return staging, lock
        _unlock(lock)


def _resumed_folder(path: Path, resume: str) -> tuple[Path, int | None]:
    """The staging folder of work that can be resumed, as it was left or new."""
    staging = _resumable(path, resume)
    while True:
        with contextlib.suppress(FileExistsError):
            staging.mkdir(mode=0o700)
        try:
            lock = _lock(staging)
        except FileNotFoundError:
            continue
        except BlockingIOError:
            message = f"another process is writing {path}"
            raise GraftError("GC063", message, hint="wait until it is done, or choose another path") from None
        except OSError:
            lock = None
        if staging.exists():
            break
        _unlock(lock)
    note = staging / _RESUME
    if not note.is_file():  # it was killed before it had begun
        note.write_text(json.dumps({"work": resume}), encoding="utf-8")
    return staging, lock


def _resumable(path: Path, resume: str) -> Path:
    return path.with_name(f".{path.name}.graftc-{resume[:12]}")


def _discard_others(path: Path, resume: str | None) -> None:
    """Throw away what killed runs have left that were to put something else in the same place."""
    if sys.platform == "win32":
        return
    kept = None if resume is None else _resumable(path, resume)
    for note in path.parent.glob(f".{glob.escape(path.name)}.graftc-*/{_RESUME}"):
        if note.parent != kept and _STAGING.fullmatch(note.parent.name):
            _sweep(note.parent, resumable=True)


def _lock(folder: Path) -> int | None:
    """An open, locked descriptor of a folder; None on systems without such locks.

    Raises:
        BlockingIOError: another process holds it; OSError: the folder has gone, or cannot be locked.
    """
    if sys.platform == "win32":
        return None
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _unlock(lock: int | None) -> None:
    if lock is not None:
        os.close(lock)


@contextlib.contextmanager
def alone_in(folder: Path | None) -> Iterator[None]:
    """Inside, nobody else who asks for it is at work in a folder: no other process, thread or call. Where there is no
    folder, or no such lock, nothing is held.

    Raises:
        GraftError: GC063 where somebody is.
    """
    lock = None
    try:
        lock = None if folder is None else _lock(folder)
    except BlockingIOError as error:
        hint = "wait until it has ended, or take another folder"
        raise GraftError("GC063", f"another run is at work in {folder}", hint=hint) from error
    except OSError:
        pass
    try:
        yield
    finally:
        _unlock(lock)


def recover(folder: Path) -> None:
    """Finish or throw away what killed runs of this user left in ``folder``. What cannot be mended stays as it is."""
    if sys.platform == "win32":
        return
    try:
        found = [e.name for e in os.scandir(folder) if _STAGING.fullmatch(e.name) and e.is_dir(follow_symlinks=False)]
    except OSError:
        return
    for name in found:
        _sweep(folder / name)


def _sweep(staging: Path, *, resumable: bool = False) -> None:
    """Finish what a staging folder of a killed run of this user has committed, and throw the rest away.

    Args:
        staging: the folder.
        resumable: throw away work that could be resumed, too.
    """
    try:
        lock = _lock(staging)
    except OSError:
        return
    try:
        waits = (staging / _RESUME).is_file() and not (staging / _JOURNAL).is_file()
        if os.stat(staging, follow_symlinks=False).st_uid == os.getuid() and (resumable or not waits):
            with contextlib.suppress(OSError, ValueError, KeyError, AttributeError, TypeError):
                _finish(staging)
            shutil.rmtree(staging, ignore_errors=True)
    except OSError:
        return
    finally:
        _unlock(lock)


# --- putting in place --------------------------------------------------------------------------------------------


def _commit(staging: Path, path: Path, companions: Sequence[str], force: bool, keep_modes: bool) -> None:
    """Make sure that everything is on the disk, write the journal, and put everything in place."""
    new = staging / _NEW
    names = sorted(entry.name for entry in new.iterdir())
    if path.name not in names:
        raise FileNotFoundError(errno.ENOENT, "nothing was written", str(path))
    _flush(new, keep_modes)
    # What names the others comes last when things appear and first when they go, so that it never points at nothing.
    names.remove(path.name)
    place = [*names, path.name]
    journal = {
        "place": {name: (new / name).lstat().st_ino for name in place},
        "companions": list(companions),
        "replace": force,
    }
    draft = staging / f"{_JOURNAL}.draft"
    draft.write_text(json.dumps(journal), encoding="utf-8")
    _flush(draft, keep_modes)
    os.rename(draft, staging / _JOURNAL)
    _sync(staging)
    _finish(staging)


def _finish(staging: Path) -> None:
    """Put in place what the journal lists; nothing without one. Done again after a kill, it goes on where it was.

    Raises:
        OSError: something is in the way; ValueError: the journal is not one.
    """
    try:
        journal: dict[str, Any] = json.loads((staging / _JOURNAL).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return
    parent, new, old = staging.parent, staging / _NEW, staging / _OLD
    inodes: dict[str, int] = journal["place"]
    place, companions = list(inodes), journal["companions"]
    if any(name != os.path.basename(name) or name in ("", ".", "..") for name in [*place, *companions]):
        raise ValueError("not a journal")
    # After an exchange the old one is there under the name of the new one.
    pending = [n for n in place if os.path.lexists(new / n) and (new / n).lstat().st_ino == inodes[n]]
    try:
        if journal["replace"] and place[-1] in pending:
            alone = len(place) == 1 and not any(os.path.lexists(parent / name) for name in companions)
            if alone and _exchange(new / place[-1], parent / place[-1]):
                return
            old.mkdir(exist_ok=True)
            for name in [place[-1], *companions]:
                # A companion that has been put in place already is a new one.
                if os.path.lexists(parent / name) and (name not in place or name in pending):
                    _aside(parent / name, old / name)
        for name in pending:
            _place(new / name, parent / name)
    except OSError:
        _take_back(parent, new, old, pending)
        raise
    finally:
        with contextlib.suppress(OSError):
            _sync(parent)


def _take_back(parent: Path, new: Path, old: Path, placed: Sequence[str]) -> None:
    """Everything as it was before putting in place began."""
    for name in reversed(placed):
        if not os.path.lexists(new / name):
            os.rename(parent / name, new / name)
    for name in os.listdir(old) if old.exists() else ():
        if not os.path.lexists(parent / name):
            os.rename(old / name, parent / name)


def _aside(path: Path, old: Path) -> None:
    if os.path.lexists(old):
        shutil.rmtree(old) if old.is_dir() and not old.is_symlink() else old.unlink()
    os.rename(path, old)


def _place(new: Path, path: Path) -> None:
    """Rename, unless something has come to be there."""
    if _rename_with(new, path, _NO_REPLACE):
        return
    if os.path.lexists(path):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
    os.rename(new, path)


def _exchange(new: Path, path: Path) -> bool:
    """Swap two paths in one step, or put the first in place of nothing; False where the system cannot."""
    if not os.path.lexists(path):
        os.rename(new, path)
        return True
    if not new.is_dir() and not path.is_dir():
        os.replace(new, path)
        return True
    return _rename_with(new, path, _EXCHANGE)


_NO_REPLACE, _EXCHANGE = 1, 2
_AT_FDCWD = -100
_UNSUPPORTED = {errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP}


def _rename_with(old: Path, new: Path, flag: int) -> bool:
    """Linux's ``renameat2``; False where there is no such thing.

    Raises:
        OSError: it is there and refuses.
    """
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if os.name == "posix" else None
    if call is None:
        return False
    if call(_AT_FDCWD, os.fsencode(old), _AT_FDCWD, os.fsencode(new), flag) == 0:
        return True
    number = ctypes.get_errno()
    if number in _UNSUPPORTED:
        return False
    raise OSError(number, os.strerror(number), str(new))


def _flush(path: Path, keep_modes: bool) -> None:
    """Everything under ``path`` onto the disk, with the permissions that new files have unless these are kept."""
    if path.is_symlink():
        return
    if path.is_dir():
        for entry in path.iterdir():
            _flush(entry, keep_modes)
    elif path.is_file() and not keep_modes:
        mode = stat.S_IMODE(path.stat().st_mode)
        # Some writers make files that only their owner may read.
        path.chmod(mode | (0o666 & ~_umask()))
    _sync(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    current = os.umask(0o077)
    os.umask(current)
    return current
