"""Several users on one machine: a shared folder that all of them write to, and snapshots of what must not change."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

OTHER = 54321
"""A user who is nobody here."""

as_root = pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can be two users")


def give(path: Path, user: int = OTHER) -> None:
    """Change the owner of a file, a link, or a folder and everything in it."""
    os.chown(path, user, user, follow_symlinks=False)
    if path.is_dir() and not path.is_symlink():
        for inner in path.iterdir():
            give(inner, user)


def snapshot(path: Path) -> dict[str, tuple[int, int, bytes]]:
    """Return the kind and permissions, owner, and content of a path and of everything below it, by path."""
    states = {}
    for each in [path, *path.rglob("*")]:
        state = each.lstat()
        content = os.readlink(each).encode() if each.is_symlink() else each.read_bytes() if each.is_file() else b""
        states[str(each.relative_to(path))] = (state.st_mode, state.st_uid, content)
    return states
