"""Measure the memory use of a training step by running it on tensors without memory."""

from __future__ import annotations

import weakref
from collections.abc import Hashable, Mapping
from typing import Any

import torch
from torch import Tensor

from graftc.compat.modes import TorchDispatchMode
from graftc.compat.operators import LOCAL_SCALAR
from graftc.compat.pytree import tree_leaves
from graftc.runtime.activations.workspaces import WORKSPACES

Part = Hashable
"""The name of a part of a step; None for the first part."""

Levels = Mapping[Part, list[int]]
"""The bytes in use over time, by part."""


class Tracking(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Tracks the bytes of all tensors created while it is active.

    Attributes:
        level: the bytes of the tensors that currently exist.
        levels: the levels after each allocation, by part of the step.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.level = 0
        self.levels: dict[Part, list[int]] = {None: [0]}
        self._part: Part = None
        self._known: dict[int, weakref.ref[Any]] = {}

    def enter(self, part: Part) -> None:
        """Begin a part."""
        self._part = part
        self._note(self.level)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is LOCAL_SCALAR:  # code reads a value: return an arbitrary one
            return 1.0 if args[0].is_floating_point() else 0 if args[0].dtype != torch.bool else False
        # Arguments existed before, or have been tracked since their creation.
        given = {id(storage) for storage in map(_storage, tree_leaves((args, kwargs))) if storage is not None}
        result = func(*args, **(kwargs or {}))
        for storage in map(_storage, tree_leaves(result)):
            if storage is not None and id(storage) not in given and id(storage) not in self._known:
                self._follow(storage)
        if func in WORKSPACES:
            self._note(self.level + WORKSPACES[func](*args, **(kwargs or {})))
        return result

    def _note(self, level: int) -> None:
        self.levels.setdefault(self._part, []).append(level)

    def _follow(self, storage: Any) -> None:
        size, key = storage.nbytes(), id(storage)

        def gone(_: Any) -> None:
            self.level -= size
            del self._known[key]

        self._known[key] = weakref.ref(storage, gone)
        self.level += size
        self._note(self.level)


def _storage(value: Any) -> Any:
    return value.untyped_storage() if isinstance(value, Tensor) else None


def highest(levels: Levels) -> int:
    """Return the highest level."""
    return max(map(max, levels.values()))
