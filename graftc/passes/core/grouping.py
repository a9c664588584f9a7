"""Grouping of items by what they have in common."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

K = TypeVar("K")
T = TypeVar("T")


def grouped(items: Iterable[T], key: Callable[[T], K]) -> dict[K, list[T]]:
    """Return items by their keys; keys and the items of a key are in the order in which they occur."""
    return grouped_pairs((key(item), item) for item in items)


def grouped_pairs(pairs: Iterable[tuple[K, T]]) -> dict[K, list[T]]:
    """Return the values of each key, with keys and values in the order in which they occur."""
    groups: dict[K, list[T]] = {}
    for key, value in pairs:
        groups.setdefault(key, []).append(value)
    return groups
