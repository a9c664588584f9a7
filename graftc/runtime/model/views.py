"""Views of a model without some adaptations, the ones that calls leave out, and tensors added to a tree."""

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
    """Protocol of objects that read numbers of forward passes, as `Observer` does."""

    def watching(self) -> AbstractContextManager[None]:
        """Observe a forward pass that runs in the block."""


class Waiting(list[Tensor]):
    """Terms that are not in a loss yet. A copied model has none, since they belong to passes of the original."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Waiting:
        return Waiting()


@dataclass
class Progress:
    """The progress of a model's training, apart from its tensors.

    Attributes:
        trained: adaptations with a controller or an objective whose tensors have had a gradient.
        warned: subjects of the warnings that have been given.
        extra_losses: the number of times that the sum of the objectives has been requested.
        due: whether it has not been requested since the last step.
        waiting: terms that are not in a loss yet.
        observer: reads numbers of the next forward passes, if that has been requested.
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
        off: the adaptations that `disable` has named.
        within: the adaptations that each open context leaves out, the outermost context first.
    """

    off: frozenset[str] = frozenset()
    within: list[frozenset[str]] = field(default_factory=list)

    @property
    def hidden(self) -> frozenset[str]:
        """The adaptations that calls leave out now."""
        return self.off.union(*self.within)


def with_every_adaptation(method: Callable[Concatenate[Any, P], R]) -> Callable[Concatenate[Any, P], R]:
    """Wrap a method of an object with a Runner, ``self.runner``, so that it gets one with every adaptation.

    It does so even while `disable` and `disabled` leave adaptations out of calls. Every method that writes a file or
    makes another model is wrapped. Calls in other threads are not affected.
    """

    @functools.wraps(method)
    def called(self: Any, *args: P.args, **kwargs: P.kwargs) -> R:
        return method(type(self)(self.runner.complete()), *args, **kwargs)

    return called  # type: ignore[return-value]


def tables_of(steering: Steerings) -> tuple[Mapping[str, Any], ...]:
    return steering.controllers, steering.objectives, steering.outputs


def over(compilation: Compilation, known: Compilation) -> Compilation:
    """Return a Compilation that was made of the same source, over the tensors of another one."""
    return replace(compilation, store=known.store, model=known.model, watch=known.watch)


class Tables:
    """Adds tensors to a Store's tree, and removes them again if necessary."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._put: list[str] = []

    def put(self, fqn: str, tensor: Tensor, *, persistent: bool) -> None:
        """Add a tensor by a new name."""
        self._store.put(fqn, tensor, persistent=persistent)
        self._put.append(fqn)

    def undo(self) -> None:
        """Remove all tensors that were added."""
        for fqn in self._put:
            self._store.drop(fqn)
