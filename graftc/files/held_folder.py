"""Folders that stay open, so that every operation applies to the opened folder even if its path later leads elsewhere.

In shared locations, another user may replace a folder with a link or with a folder of their own between a check and its
use. A folder is therefore opened once, without following a link, and checked through its descriptor, and everything in
it is named relative to that descriptor. On systems without such descriptors (Windows), paths are used.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import shutil
import stat
import sys
import tempfile
from pathlib import Path
from typing import Self

from graftc.specs.regular_files import read_regular

if sys.platform != "win32":
    import fcntl


_DEEPEST = 40
"""The maximum depth of nested folders in a folder left by a killed run."""
_NO_REPLACE, _EXCHANGE = 1, 2
_UNSUPPORTED = {errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP}
_NO_LOCKS = {errno.ENOLCK, errno.EBADF, *_UNSUPPORTED}
_READING = os.O_RDONLY | sum(getattr(os, name, 0) for name in ("O_NOFOLLOW", "O_NONBLOCK", "O_CLOEXEC"))
_OTHERS, _WRITING_OTHERS = 0o077, 0o022


class HeldFolder:
    """A folder that is open until `close`.

    Args:
        path: its path.
        descriptor: its descriptor; None on systems that have none.
    """

    def __init__(self, path: Path, descriptor: int | None) -> None:
        self.path, self._descriptor = path, descriptor

    @classmethod
    def open(cls, path: Path, *, follow: bool = False) -> Self:
        """Open a folder.

        Args:
            path: its path.
            follow: whether ``path`` itself may be a link.

        Raises:
            OSError: if it is not a folder, or is a link, or its path has a NUL byte.
        """
        if "\0" in os.fspath(path):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL), os.fspath(path))
        if sys.platform == "win32":
            if not path.is_dir() or (path.is_symlink() and not follow):
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path))
            return cls(path, None)
        flags = _READING & ~os.O_NOFOLLOW if follow else _READING
        return cls(path, os.open(path, flags | os.O_DIRECTORY))

    def inner(self, name: str) -> HeldFolder:
        """Open a folder in this one; it must not be a link.

        Raises:
            OSError: if it is not a folder, or is a link.
        """
        if self._descriptor is None:
            return HeldFolder.open(self.path / name)
        return HeldFolder(self.path / name, os.open(name, _READING | os.O_DIRECTORY, dir_fd=self._descriptor))

    def close(self) -> None:
        """Close the folder, which ends its lock; closing it again does nothing."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- looking ---

    def stat(self, name: str | None = None) -> os.stat_result:
        """Return the status of this folder, or of an entry in it: for a link, that of the link itself.

        Raises:
            OSError: if the entry does not exist.
        """
        if name is not None:
            return os.stat(self._name(name), dir_fd=self._descriptor, follow_symlinks=False)
        return os.lstat(self.path) if self._descriptor is None else os.fstat(self._descriptor)

    def exists(self, name: str) -> bool:
        """Return whether the folder has an entry with this name, which may be a dangling link."""
        try:
            self.stat(name)
        except OSError:
            return False
        return True

    def is_file(self, name: str) -> bool:
        """Return whether the folder has a regular file, not a link, with this name."""
        return self.exists(name) and stat.S_ISREG(self.stat(name).st_mode)

    def is_folder(self, name: str) -> bool:
        """Return whether the folder has a subfolder, not a link, with this name."""
        return self.exists(name) and stat.S_ISDIR(self.stat(name).st_mode)

    def names(self) -> list[str]:
        """Return the names of everything in the folder, sorted."""
        return sorted(os.listdir(self.path if self._descriptor is None else self._descriptor))

    def is_at_its_path(self) -> bool:
        """Return whether its path still leads to this very folder, without a link as its last component."""
        try:
            return os.path.samestat(os.lstat(self.path), self.stat())
        except OSError:
            return False

    def is_private(self, *, links: bool = True) -> bool:
        """Return whether the folder and everything in it belong to this user, and no other user may write there.

        Args:
            links: whether symbolic links, which are not followed, and files with several hard links are allowed.
        """
        status = self.stat()
        if not is_own(status, self.path.parent) or status.st_mode & _WRITING_OTHERS:
            return False
        try:
            return self._is_private(self.path.parent, links=links, closed=not status.st_mode & _OTHERS, depth=0)
        except OSError:
            return False

    def _is_private(self, beside: Path, *, links: bool, closed: bool, depth: int) -> bool:
        """Return `is_private` for the contents; entries that other users cannot reach may have any permissions."""
        for name in self.names():
            status = self.stat(name)
            kind = status.st_mode
            if stat.S_ISLNK(kind):
                if not links:
                    return False
                continue
            if not (stat.S_ISDIR(kind) or stat.S_ISREG(kind)) or not is_own(status, beside):
                return False
            if (kind & _WRITING_OTHERS and not closed) or (stat.S_ISREG(kind) and status.st_nlink > 1 and not links):
                return False
            if stat.S_ISDIR(kind):
                if depth == _DEEPEST:
                    return False
                inner: HeldFolder = self.inner(name)
                with inner:
                    if not inner._is_private(beside, links=links, closed=closed, depth=depth + 1):
                        return False
        return True

    # --- changing ---

    def make(self, name: str, mode: int = 0o777) -> None:
        """Create a folder in this one.

        Raises:
            OSError: if it cannot be created.
        """
        os.mkdir(self._name(name), mode, dir_fd=self._descriptor)

    def read(self, name: str, most: int) -> bytes:
        """Return the content of a regular file in the folder.

        Raises:
            OSError: if it is not a regular file, is a link, or is larger than ``most`` bytes.
        """
        return read_regular(self._name(name), most, folder=self._descriptor, follow=False)

    def write(self, name: str, text: str) -> None:
        """Create a text file in the folder, and flush it to disk.

        Raises:
            OSError: if the name exists already, or the file cannot be written.
        """
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0)
        with open(os.open(self._name(name), flags, 0o666, dir_fd=self._descriptor), "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())

    def rename(self, name: str, other: HeldFolder, new: str) -> None:
        """Move an entry of this folder to another folder, under a new name; a file with that name is replaced.

        Raises:
            OSError: under the same conditions as `os.rename`.
        """
        places = {"src_dir_fd": self._descriptor, "dst_dir_fd": other._descriptor}
        os.replace(self._name(name), other._name(new), **places)

    def rename_new(self, name: str, other: HeldFolder, new: str) -> None:
        """Move an entry as `rename` does, unless the new name already exists.

        Raises:
            OSError: if it already exists.
        """
        if self._rename_with(name, other, new, _NO_REPLACE):
            return
        if other.exists(new):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(other.path / new))
        self.rename(name, other, new)

    def exchange(self, name: str, other: HeldFolder, new: str) -> bool:
        """Swap two entries in one step, and return whether the system supports that.

        Raises:
            OSError: if the system supports it, but the swap fails.
        """
        return self._rename_with(name, other, new, _EXCHANGE)

    def _rename_with(self, name: str, other: HeldFolder, new: str, flag: int) -> bool:
        """Call Linux's ``renameat2``, and return whether it is available."""
        call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if os.name == "posix" else None
        if call is None or self._descriptor is None or other._descriptor is None:
            return False
        if call(self._descriptor, os.fsencode(name), other._descriptor, os.fsencode(new), flag) == 0:
            return True
        number = ctypes.get_errno()
        if number in _UNSUPPORTED:
            return False
        raise OSError(number, os.strerror(number), str(other.path / new))

    def remove(self, name: str) -> None:
        """Remove a file, a link, or a folder with everything in it.

        Links are not followed, and a folder that contains another user's folder is not removed.

        Raises:
            OSError: if it cannot be removed.
        """
        if not self.is_folder(name):
            os.unlink(self._name(name), dir_fd=self._descriptor)
            return
        if (other := foreign_folder(self.path / name)) is not None:
            raise PermissionError(errno.EPERM, "it belongs to another user", str(other))
        shutil.rmtree(self._name(name), dir_fd=self._descriptor)

    def remove_all(self) -> None:
        """Remove everything in the folder, as far as permitted and possible."""
        with contextlib.suppress(OSError):
            for name in self.names():
                with contextlib.suppress(OSError, RecursionError):
                    self.remove(name)

    def remove_from(self, parent: HeldFolder) -> None:
        """Remove this folder with everything in it, as far as possible, from the folder that contains it.

        If something else has taken its place, it is left alone.
        """
        self.remove_all()
        with contextlib.suppress(OSError):
            if os.path.samestat(parent.stat(self.path.name), self.stat()):
                os.rmdir(parent._name(self.path.name), dir_fd=parent._descriptor)

    def flush(self, name: str, mode_of_files: int | None) -> None:
        """Flush an entry of the folder to disk, with everything in it.

        Args:
            name: its name; links stay unchanged.
            mode_of_files: permissions that regular files get in addition to their own.

        Raises:
            OSError: if it cannot be read or written.
        """
        kind = self.stat(name).st_mode
        if stat.S_ISDIR(kind):
            with self.inner(name) as inner:
                for each in inner.names():
                    inner.flush(each, mode_of_files)
                inner.sync()
        elif stat.S_ISREG(kind):
            self._flush_file(name, mode_of_files)

    def _flush_file(self, name: str, mode: int | None) -> None:
        if mode is not None and (now := stat.S_IMODE(self.stat(name).st_mode)) | mode != now:
            # Some writers create files that only their owner may read.
            os.chmod(self._name(name), now | mode, dir_fd=self._descriptor)
        descriptor = os.open(self._name(name), _READING, dir_fd=self._descriptor)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def sync(self) -> None:
        """Flush the folder's list of names to disk.

        Raises:
            OSError: if that fails.
        """
        if self._descriptor is not None:
            os.fsync(self._descriptor)

    def lock(self) -> None:
        """Lock the folder until it is closed; do nothing on systems and file systems without locks.

        Raises:
            BlockingIOError: if another process, thread or call holds the lock.
        """
        if sys.platform == "win32" or self._descriptor is None:
            return
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise

    def _name(self, name: str) -> str:
        return str(self.path / name) if self._descriptor is None else name


def is_own(status: os.stat_result, folder: Path) -> bool:
    """Return whether a file or folder belongs to this user, or to the user who comes to own this user's new files.

    Args:
        status: its status.
        folder: a folder on the same file system that this user may write to.
    """
    if sys.platform == "win32" or status.st_uid == os.geteuid():
        return True
    with contextlib.suppress(OSError), tempfile.TemporaryFile(dir=folder) as file:
        return os.fstat(file.fileno()).st_uid == status.st_uid
    return False


def foreign_folder(path: Path) -> Path | None:
    """Return the first folder that belongs to another user, among a folder and its subfolders; None if there is none.

    Links are not followed.

    Raises:
        OSError: if a folder cannot be read.
    """
    waiting = [path]
    while waiting:
        folder = waiting.pop()
        if not is_own(os.lstat(folder), path.parent):
            return folder
        with os.scandir(folder) as entries:
            waiting += [Path(entry.path) for entry in entries if entry.is_dir(follow_symlinks=False)]
    return None
