"""What a model is shown without: which adaptations calls leave out, the views of these, and tensors put into a tree."""

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
from graftc.runtime.model.root import AdaptedView

P = ParamSpec("P")
R = TypeVar("R")


class Observing(Protocol):
    """Reads numbers of forward passes: see `Observer`."""

    def watching(self) -> AbstractContextManager[None]:
        """Around a forward pass."""


class Waiting(list[Tensor]):
    """Terms that no loss has yet. A copied model has none: they belong to passes of the other one."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Waiting:
        return Waiting()


@dataclass
class Progress:
    """How far the training of a model is, beside its tensors.

    Attributes:
        trained: adaptations with a controller or an objective whose tensors have had a gradient.
        warned: of what has been warned.
        extra_losses: how often the sum of the objectives has been asked for.
        due: whether it has not been since the last step.
        waiting: terms that no loss has yet.
        observer: reads numbers of the forward passes to come, where somebody has asked for them.
    """

    trained: set[str] = field(default_factory=set)
    warned: set[str] = field(default_factory=set)
    extra_losses: int = 0
    due: bool = False
    waiting: Waiting = field(default_factory=Waiting)
    observer: Observing | None = None


@dataclass
class Leaving:
    """Which adaptations a model leaves out.

    Attributes:
        off: those that `disable` has named.
        within: what each context that is open leaves out, the outermost first.
    """

    off: frozenset[str] = frozenset()
    within: list[frozenset[str]] = field(default_factory=list)

    @property
    def hidden(self) -> frozenset[str]:
        """What calls leave out now."""
        return self.off.union(*self.within)


@dataclass
class Views:
    """Views of a model.

    Attributes:
        known: by the adaptations that they are without.
        made: how many have been made so far.
    """

    known: dict[frozenset[str], AdaptedView] = field(default_factory=dict)
    made: int = 0


def with_every_adaptation(method: Callable[Concatenate[Any, P], R]) -> Callable[Concatenate[Any, P], R]:
    """A method of what has a Runner, ``self.runner``: it gets one with every adaptation, whatever `disable` and
    `disabled` leave out of calls meanwhile.

    Whatever writes a file or makes another model is such a method. Calls in other threads go on as they were.
    """

    @functools.wraps(method)
    def called(self: Any, *args: P.args, **kwargs: P.kwargs) -> R:
        return method(type(self)(self.runner.complete()), *args, **kwargs)

    return called  # type: ignore[return-value]


def tables_of(steering: Steerings) -> tuple[Mapping[str, Any], ...]:
    return steering.controllers, steering.objectives, steering.outputs


def over(made: Compilation, known: Compilation) -> Compilation:
    """A Compilation that was made of the same source, over the tensors of another one."""
    return replace(made, store=known.store, model=known.model, watch=known.watch)


class Tables:
    """Puts tensors into a Store's tree and takes them out again."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._put: list[str] = []

    def put(self, fqn: str, tensor: Tensor, *, persistent: bool) -> None:
        """Put a tensor in by a new name."""
        self._store.put(fqn, tensor, persistent=persistent)
        self._put.append(fqn)

    def drop(self, fqn: str) -> None:
        """Take a tensor out, and containers that are empty then."""
        self._store.drop(fqn)

    def undo(self) -> None:
        """Take out all that was put in."""
        for fqn in self._put:
            self._store.drop(fqn)
