"""Hooks that run once ``save_pretrained`` has written a folder, so that other libraries load it in the same process."""

from __future__ import annotations

from collections.abc import Callable

FOLLOWERS: dict[str, Callable[[], object]] = {}
"""The functions to call, by a name, so that each is registered once."""


def follow(name: str, act: Callable[[], object]) -> None:
    """Register a function to call whenever a folder has been written."""
    FOLLOWERS[name] = act
