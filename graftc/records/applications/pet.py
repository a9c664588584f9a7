"""The result of a PET run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, TypeVar

from annotated_types import Ge, Le

from graftc.specs.records.record import Record

N = TypeVar("N")


class NamedNumbers(Record, Mapping[str, N]):
    """Numbers that are also read by their names, as those of a mapping."""

    def __getitem__(self, name: str) -> N:
        number: N = vars(self)[name]
        return number

    def __iter__(self) -> Iterator[str]:
        return iter(vars(self))

    def __len__(self) -> int:
        return len(vars(self))


@dataclass(frozen=True, eq=False)
class Accuracy(NamedNumbers[float | None]):
    """Fractions of rows with the right answer; null where there are no such rows."""

    labelled: Annotated[float | None, Ge(0), Le(1)]
    """Of the labelled rows."""

    test: Annotated[float | None, Ge(0), Le(1)]
    """Of the test set."""


@dataclass(frozen=True, eq=False)
class PetRows(NamedNumbers[int]):
    """How many rows there are."""

    labelled: Annotated[int, Ge(0)]
    """Labelled ones."""

    unlabelled: Annotated[int, Ge(1)]
    """Those that the ensemble has labelled."""

    test: Annotated[int, Ge(0)]
    """Those that nothing was learned from."""


@dataclass(frozen=True)
class PetMember(Record):
    """A member of the ensemble."""

    pattern: str
    """The name of its pattern."""

    repetition: Annotated[int, Ge(0)]
    """Its number among the pattern's members, from 0."""

    weight: Annotated[float, Ge(0), Le(1)]
    """Its weight in the ensemble; all sum to one."""

    untrained: Accuracy
    """Of its pattern before training."""

    trained: Accuracy
    """Of the last generation's member."""


@dataclass(frozen=True)
class PetGeneration(Record):
    """A generation behind the first."""

    examples: tuple[int, ...]
    """How many unlabelled rows each member learned from."""

    missing: Mapping[str, float]
    """How many rows of each label the sets lack on average, since too few were predicted."""
