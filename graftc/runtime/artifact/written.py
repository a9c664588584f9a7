"""What follows once ``save_pretrained`` has written a folder: classes of other libraries are told of it, so that they
load it in the same process."""

from __future__ import annotations

from collections.abc import Callable

FOLLOWERS: dict[str, Callable[[], object]] = {}
"""By a name, so that each is there once."""


def follow(name: str, act: Callable[[], object]) -> None:
    """Have something done whenever a folder has been written."""
    FOLLOWERS[name] = act
