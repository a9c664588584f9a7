"""Read untrusted files: regular files only, and only up to a size limit.

A pipe has no end, opening a device may have any effect, and a sparse file may have any size. A file is therefore
checked before it is opened and, since it may have been replaced in between, again afterwards. Uses the standard library
only.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO

JSON_BYTES = 2**24
"""Maximum size of a config, a record or a note, in bytes."""

INDEX_BYTES = 2**25
"""Maximum size of an index of shards, in bytes."""
_FLAGS = os.O_RDONLY | sum(getattr(os, name, 0) for name in ("O_NONBLOCK", "O_CLOEXEC", "O_NOCTTY", "O_BINARY"))
_PIECE = 2**20


def require_regular(path: str | os.PathLike[str], most: int | None = None) -> None:
    """Check that a path is a regular file within the size limit, without opening it; links are followed.

    Raises:
        OSError: EINVAL if it is not a regular file, EFBIG if it is too large.
    """
    _require(os.stat(path), path, most)


def open_regular(
    path: str | os.PathLike[str], most: int | None = None, *, folder: int | None = None, follow: bool = True
) -> BinaryIO:
    """Open a regular file for reading.

    Args:
        path: path of the file.
        most: maximum size in bytes; unlimited by default.
        folder: a descriptor of the folder that ``path`` is relative to.
        follow: whether the last part of the path may be a link.

    Raises:
        OSError: EINVAL if it is not a regular file, EFBIG if it is too large, ELOOP for a link; any other error as the
            system raises it. An impossible path, for example one with a NUL byte, raises EINVAL as well.
    """
    try:
        _require(os.stat(path, dir_fd=folder, follow_symlinks=follow), path, most, follow=follow)
        flags = _FLAGS if follow else _FLAGS | getattr(os, "O_NOFOLLOW", 0)
        descriptor = os.open(path, flags, dir_fd=folder)
    except ValueError as error:
        raise OSError(errno.EINVAL, str(error), os.fspath(path)) from error
    try:
        _require(os.fstat(descriptor), path, most)
        return open(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read_regular(
    path: str | os.PathLike[str], most: int = JSON_BYTES, *, folder: int | None = None, follow: bool = True
) -> bytes:
    """Return the content of a regular file.

    Args:
        path: path of the file.
        most: maximum size in bytes. Memory is allocated as the file needs it, not up front for the limit.
        folder: a descriptor of the folder that ``path`` is relative to.
        follow: whether the last part of the path may be a link.

    Raises:
        OSError: as for `open_regular`.
    """
    content = bytearray()
    with open_regular(path, most, folder=folder, follow=follow) as file:
        while piece := file.read(min(_PIECE, most + 1 - len(content))):
            content += piece
            if len(content) > most:  # it grew
                raise _too_large(path, len(content), most)
    return bytes(content)


def _require(status: os.stat_result, path: str | os.PathLike[str], most: int | None, *, follow: bool = True) -> None:
    name = str(Path(path))
    if not follow and stat.S_ISLNK(status.st_mode):
        raise OSError(errno.ELOOP, "it is a link", name)
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), name)
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "it is not a regular file", name)
    if most is not None and status.st_size > most:
        raise _too_large(path, status.st_size, most)


def _too_large(path: str | os.PathLike[str], size: int, most: int) -> OSError:
    return OSError(errno.EFBIG, f"it has {size:,} bytes, more than {most:,}", str(path))
