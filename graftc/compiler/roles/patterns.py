"""Indices of values as patterns, in which sources are counted from 0, beside the numbers that these sources have.

Layers do the same with the columns of other sources, so what an operator makes of a pattern is found out once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor

from graftc.compiler.roles.indices import SHIFT, renumbered

T = TypeVar("T")


@dataclass(frozen=True, eq=False, slots=True)
class Indexed:
    """The indices of a value.

    Attributes:
        pattern: a tensor, or a list of them, in which sources are counted from 0.
        sources: their numbers, in order; None where those are in the pattern itself.
    """

    pattern: Any
    sources: tuple[int, ...] | None

    @property
    def index(self) -> Tensor | None:
        """The pattern, where it is one tensor."""
        return self.pattern if isinstance(self.pattern, Tensor) else None


class Patterns:
    """What is made of patterns, each once.

    Args:
        shared: False where values are written to: then every value has a pattern of its own, with the numbers of its
            sources in it.
    """

    def __init__(self, shared: bool) -> None:
        self._shared = shared
        self._made: dict[Any, tuple[Any, Any]] = {}

    def once(self, key: Any, patterns: Iterable[Any], make: Callable[[], T]) -> T:
        """What is made of some patterns.

        Args:
            key: equal where the same is made of the same patterns; these may be in it by identity.
            patterns: they are kept, so that their identities stay theirs.
            make: makes it.
        """
        if not self._shared:
            return make()
        if key not in self._made:
            self._made[key] = make(), tuple(patterns)
        found: T = self._made[key][0]
        return found

    def source(self, own: Tensor, number: int) -> Indexed:
        """The indices of a source.

        Args:
            own: its columns.
            number: its own.
        """
        return Indexed(own, (number,)) if self._shared else Indexed(own + (number << SHIFT), None)

    def together(self, held: Iterable[Indexed]) -> tuple[int, ...] | None:
        """The sources of several values."""
        found = {own.sources for own in held}
        return next(iter(found)) if len(found) == 1 else tuple(sorted({n for own in found for n in own or ()}))

    def among(self, held: Indexed, sources: tuple[int, ...] | None) -> Any:
        """A pattern with its sources counted among others."""
        if sources is None or held.sources is None or held.sources == sources:
            return held.pattern
        places, pattern = tuple(sources.index(number) for number in held.sources), held.pattern
        if isinstance(pattern, list | tuple):
            return [None if own is None else self._renumbered(own, places) for own in pattern]
        return self._renumbered(pattern, places)

    def _renumbered(self, pattern: Tensor, places: tuple[int, ...]) -> Tensor:
        if places == tuple(range(len(places))):
            return pattern
        return self.once(("renumbered", places, id(pattern)), (pattern,), lambda: renumbered(pattern, places))
