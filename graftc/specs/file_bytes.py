"""Bytes of files that somebody else may have written: regular files of a bounded size. The standard library only."""

from __future__ import annotations

import os
import stat
from typing import BinaryIO

__all__ = ["open_regular", "read_bytes"]


def open_regular(path: str | os.PathLike[str]) -> BinaryIO:
    """A file, open for reading; opening it never waits, as opening a named pipe would.

    Raises:
        ValueError: it is not a regular file, or no file can have this name; OSError.
    """
    flags = (getattr(os, name, 0) for name in ("O_NONBLOCK", "O_CLOEXEC", "O_BINARY"))
    number = os.open(path, os.O_RDONLY | sum(flags))
    try:
        if not stat.S_ISREG(os.fstat(number).st_mode):
            raise ValueError("it is not a regular file")
        return os.fdopen(number, "rb")
    except BaseException:
        os.close(number)
        raise


def read_bytes(path: str | os.PathLike[str], most: int) -> bytes:
    """The bytes of a file, of which there may be only so many; a larger one is refused before it is read.

    Raises:
        ValueError: there are more, or it is not a regular file; OSError.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        raw = file.read(min(size, most) + 1) if size <= most else b""
    if size > most or len(raw) > most:
        raise ValueError(f"it has more than {most} bytes")
    return raw
