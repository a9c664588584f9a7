"""TensorChanges of a Store's tensors by other threads, and readers that need tensors from one moment.

A change is a write to several tensors, such as those of a slot of a bank. Readers wait for the changes that have begun,
and no change begins while there is a reader. Calls of the model are neither.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


class TensorChanges:
    """The changes and the readers of one Store.

    Attributes:
        condition: a re-entrant lock for all of this, which notifies when a change or a reader ends.
        written: what is being written; each change adds an entry, and removes it at its end.
    """

    def __init__(self) -> None:
        self.condition = threading.Condition()
        self.written: set[tuple[str, int]] = set()
        self._readers = 0
        self._later: list[Callable[[], None]] = []

    def __deepcopy__(self, memo: dict[int, Any]) -> TensorChanges:
        return TensorChanges()

    @property
    def refused(self) -> bool:
        """Whether no change may begin; hold `condition` from reading this until the change is in `written`."""
        return self._readers > 0

    def later(self, change: Callable[[], None]) -> None:
        """Make a short change when there is no reader, at once if possible; the caller holds `condition`."""
        if self.refused:
            self._later.append(change)
        else:
            change()

    @contextmanager
    def still(self) -> Iterator[None]:
        """Run the block while nothing changes. The block must not change anything itself, nor wait for a change."""
        with self.condition:
            self._readers += 1
            try:
                while self.written:
                    self.condition.wait()
            except BaseException:
                self._left()
                raise
        try:
            yield
        finally:
            with self.condition:
                self._left()

    def _left(self) -> None:
        self._readers -= 1
        while self._later and not self._readers:
            self._later.pop()()
        self.condition.notify_all()
