"""Store column indices as patterns that count sources from 0, together with the sources' actual numbers.

Similar layers do the same to the columns of different sources, so each operator is applied to a pattern only once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, fx

from graftc.compiler.roles.indices import SHIFT, renumbered

T = TypeVar("T")


@dataclass(frozen=True, eq=False, slots=True)
class Indexed:
    """A value's indices, as a pattern and the numbers of its sources.

    Attributes:
        pattern: a tensor, or a list of them, in which sources are counted from 0.
        sources: the numbers of the sources, in order; None if the pattern itself contains them.
    """

    pattern: Any
    sources: tuple[int, ...] | None

    @property
    def index(self) -> Tensor | None:
        """The pattern if it is a single tensor, otherwise None."""
        return self.pattern if isinstance(self.pattern, Tensor) else None


class Patterns:
    """A cache of results computed from patterns.

    Args:
        shared: whether values share patterns; false if the graph writes to values, whose patterns then contain the
            actual source numbers.
    """

    def __init__(self, shared: bool) -> None:
        self._shared = shared
        self._results: dict[Any, tuple[Any, Any]] = {}

    def once(self, key: Any, patterns: Iterable[Any], make: Callable[[], T]) -> T:
        """Return a result computed from some patterns, computing it only once if patterns are shared.

        Args:
            key: the result's key, equal for the same computation on the same patterns; it may contain their ids.
            patterns: the patterns, kept alive so that their ids are not reused.
            make: computes the result.
        """
        if not self._shared:
            return make()
        if key not in self._results:
            self._results[key] = make(), tuple(patterns)
        result: T = self._results[key][0]
        return result

    def source(self, own: Tensor, number: int) -> Indexed:
        """Return a source's indices.

        Args:
            own: the source's columns.
            number: the source's number.
        """
        return Indexed(own, (number,)) if self._shared else Indexed(own + (number << SHIFT), None)

    def together(self, values: Iterable[Indexed]) -> tuple[int, ...] | None:
        """Return the sources of several values, taken together."""
        sources = {own.sources for own in values}
        return next(iter(sources)) if len(sources) == 1 else tuple(sorted({n for own in sources for n in own or ()}))

    def among(self, value: Indexed, sources: tuple[int, ...] | None) -> Any:
        """Return a value's pattern with its sources renumbered to their positions in `sources`."""
        if sources is None or value.sources is None or value.sources == sources:
            return value.pattern
        places, pattern = tuple(sources.index(number) for number in value.sources), value.pattern
        if isinstance(pattern, list | tuple):
            return [None if own is None else self._renumbered(own, places) for own in pattern]
        return self._renumbered(pattern, places)

    def _renumbered(self, pattern: Tensor, places: tuple[int, ...]) -> Tensor:
        if places == tuple(range(len(places))):
            return pattern
        return self.once(("renumbered", places, id(pattern)), (pattern,), lambda: renumbered(pattern, places))


def hashable(value: Any, known: Callable[[Any], Any]) -> Any:
    """Return arguments in hashable form, as a cache key for results."""
    if isinstance(value, fx.Node | torch.SymInt):
        return known(value)
    if isinstance(value, list | tuple):
        return tuple(hashable(item, known) for item in value)
    if isinstance(value, Mapping):
        return tuple((name, hashable(item, known)) for name, item in value.items())
    if isinstance(value, slice):
        return slice, hashable((value.start, value.stop, value.step), known)
    return type(value), value
