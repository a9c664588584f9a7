"""Check that a disk has room for a file before it is written."""

from __future__ import annotations

import os
from pathlib import Path


def require_disk_space(path: Path, size: int) -> None:
    """Check that the disk has room for a file, by allocating a file of that size beside it and removing it again.

    Does nothing on systems without `os.posix_fallocate`.

    Args:
        path: the path of the file to be written.
        size: its size in bytes.

    Raises:
        OSError: if there is not enough room.
    """
    if not hasattr(os, "posix_fallocate"):
        return
    probe = path.with_name(f"{path.name}.room")
    try:
        with probe.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, size)
    finally:
        probe.unlink(missing_ok=True)
