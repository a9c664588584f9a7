"""`Worklist`: the pending and visited items of a graph traversal."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from typing import Generic, Self, TypeVar

T = TypeVar("T")


class Worklist(Generic[T]):
    """Items that a loop visits once each, and to which it may add more while it runs.

    Args:
        items: the initial items.
        nearest_first: whether to visit items in the order in which they were added; by default, the most recent is
            next.

    Attributes:
        visited: the items visited so far.
    """

    def __init__(self, items: Iterable[T], *, nearest_first: bool = False) -> None:
        self.visited: set[T] = set()
        self._pending = deque(items)
        self._next = self._pending.popleft if nearest_first else self._pending.pop

    def __iter__(self) -> Iterator[T]:
        while self._pending:
            item = self._next()
            if item not in self.visited:
                self.visited.add(item)
                yield item

    def __iadd__(self, items: Iterable[T]) -> Self:
        self._pending.extend(items)
        return self
