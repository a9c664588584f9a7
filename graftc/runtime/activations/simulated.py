"""What a training step takes, from a run of it on tensors without memory."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from graftc.runtime.activations.workspaces import WORKSPACES


class Tracking(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows the bytes of all tensors that are made while it is on.

    Attributes:
        level: of those that are there.
        peak: the most that there were.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.level = self.peak = 0
        self._known: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        # What is given was there before, or has been seen when it was made.
        given = {id(storage) for storage in map(_storage, tree_leaves((args, kwargs))) if storage is not None}
        result = func(*args, **(kwargs or {}))
        for storage in map(_storage, tree_leaves(result)):
            if storage is not None and id(storage) not in given and id(storage) not in self._known:
                self._follow(storage)
        if func in WORKSPACES:
            self.peak = max(self.peak, self.level + WORKSPACES[func](*args, **(kwargs or {})))
        return result

    def _follow(self, storage: Any) -> None:
        size, key = storage.nbytes(), id(storage)

        def gone(_: Any) -> None:
            self.level -= size
            del self._known[key]

        self._known[key] = weakref.ref(storage, gone)
        self.level += size
        self.peak = max(self.peak, self.level)


def _storage(value: Any) -> Any:
    return value.untyped_storage() if isinstance(value, Tensor) else None


def peak_of(step: Callable[[], None]) -> int:
    """The most bytes that tensors take during a step on fake tensors, those before it not counted."""
    with Tracking() as tracking:
        step()
    peak: int = tracking.peak
    return peak
