"""Hooks that run after ``save_pretrained`` has written a folder, so that other libraries in the process can load it."""

from __future__ import annotations

from collections.abc import Callable

FOLLOWERS: dict[str, Callable[[], object]] = {}
"""The functions to call, by name, so that each is registered only once."""


def follow(name: str, act: Callable[[], object]) -> None:
    """Register a function to call whenever a folder has been written."""
    FOLLOWERS[name] = act
