"""Helpers for views: the adaptations that calls leave out, the training progress, and tensors added to a tree."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

from torch import Tensor

from graftc.compiler.compilation import Compilation
from graftc.compiler.steering import Steerings
from graftc.passes.core.weights.store import Store

P = ParamSpec("P")
R = TypeVar("R")


class Observing(Protocol):
    """Protocol for objects that observe forward passes, such as `Observer`."""

    def watching(self) -> AbstractContextManager[None]:
        """Observe a forward pass that runs within the block."""


class Waiting(list[Tensor]):
    """Terms not yet added to a loss. A copied model has none, since the terms belong to the original's passes."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Waiting:
        return Waiting()


@dataclass
class Progress:
    """The progress of a model's training, apart from its tensors.

    Attributes:
        trained: adaptations with a controller or an objective whose tensors have had a gradient.
        warned: subjects of the warnings issued so far.
        extra_losses: the number of times that the sum of the objectives has been requested.
        due: whether this sum is required but has not been requested since the last step.
        waiting: terms not yet added to a loss.
        observer: the object that observes the next forward passes; None if no pass is to be observed.
    """

    trained: set[str] = field(default_factory=set)
    warned: set[str] = field(default_factory=set)
    extra_losses: int = 0
    due: bool = False
    waiting: Waiting = field(default_factory=Waiting)
    observer: Observing | None = None


@dataclass
class Leaving:
    """The adaptations that a model leaves out.

    Attributes:
        off: the adaptations passed to `disable`.
        within: the adaptations that each open context leaves out, outermost context first.
    """

    off: frozenset[str] = frozenset()
    within: list[frozenset[str]] = field(default_factory=list)

    @property
    def hidden(self) -> frozenset[str]:
        """The adaptations that calls currently leave out."""
        return self.off.union(*self.within)


def with_every_adaptation(method: Callable[Concatenate[Any, P], R]) -> Callable[Concatenate[Any, P], R]:
    """Wrap a method of an object that has a Runner (``self.runner``), so that it uses a Runner with every adaptation.

    This holds even while `disable` and `disabled` leave adaptations out of calls. Every method that writes a file or
    creates another model is wrapped. Calls in other threads are not affected.
    """

    @functools.wraps(method)
    def called(self: Any, *args: P.args, **kwargs: P.kwargs) -> R:
        return method(type(self)(self.runner.complete()), *args, **kwargs)

    return called  # type: ignore[return-value]


def tables_of(steering: Steerings) -> tuple[Mapping[str, Any], ...]:
    return steering.controllers, steering.objectives, steering.outputs


def over(compilation: Compilation, known: Compilation) -> Compilation:
    """Return a Compilation over the tensors of another one that was created from the same source model."""
    return replace(compilation, store=known.store, model=known.model, watch=known.watch)


class Tables:
    """Tensors added to a Store's tree, which can be removed again."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._put: list[str] = []

    def put(self, fqn: str, tensor: Tensor, *, persistent: bool) -> None:
        """Add a tensor under a new name."""
        self._store.put(fqn, tensor, persistent=persistent)
        self._put.append(fqn)

    def undo(self) -> None:
        """Remove all tensors that were added."""
        for fqn in self._put:
            self._store.drop(fqn)
