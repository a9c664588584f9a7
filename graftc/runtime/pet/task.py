"""A run of the recipe: what its parts share, and the random numbers of each."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from graftc.runtime.pet.encoding import ClozeEncoder
from graftc.runtime.pet.stages import KeptStages
from graftc.specs.pet.document import PetSpec

Fields = Mapping[str, str]
"""A text, or several, by name."""


@dataclass(frozen=True)
class Examples:
    """Texts, and what is known of them.

    Attributes:
        texts: the fields of each row.
        labels: numbers of labels; none for rows without.
    """

    texts: Sequence[Fields]
    labels: Sequence[int] = ()

    def __len__(self) -> int:
        return len(self.texts)

    def __add__(self, other: Examples) -> Examples:
        return Examples([*self.texts, *other.texts], [*self.labels, *other.labels])

    @property
    def answers(self) -> Tensor:
        """The labels, int64 ``[rows]``."""
        return torch.tensor(list(self.labels), dtype=torch.int64)


@dataclass(frozen=True)
class EnsembleMember:
    """One of the ensemble.

    Attributes:
        number: in the ensemble.
        pattern: the number of its pattern.
        repetition: which of the pattern's members it is.
    """

    number: int
    pattern: int
    repetition: int


@dataclass(frozen=True)
class Task:
    """Everything that stages of a run read.

    Attributes:
        spec: the document.
        model: the language model; never changed.
        encoder: puts texts into patterns.
        labelled, unlabelled, test: rows; those of the test are looked at and never learned from.
        seed: of all random numbers.
        stages: what is done.
    """

    spec: PetSpec
    model: nn.Module
    encoder: ClozeEncoder
    labelled: Examples
    unlabelled: Examples
    test: Examples
    seed: int
    stages: KeptStages

    @cached_property
    def members(self) -> tuple[EnsembleMember, ...]:
        """The ensemble: as many members of each pattern as there are seeds."""
        both = [(pattern, each) for pattern in range(len(self.spec.patterns)) for each in range(self.spec.seeds)]
        return tuple(EnsembleMember(number, pattern, each) for number, (pattern, each) in enumerate(both))

    @property
    def asked(self) -> dict[str, Examples]:
        """The rows that members answer, by name; missing ones are left out."""
        every = {"labelled": self.labelled, "unlabelled": self.unlabelled, "test": self.test}
        return {name: rows for name, rows in every.items() if len(rows)}

    def seed_of(self, *what: str | int) -> int:
        """A seed below 2^31 that depends on the run's and on what it is for, and on nothing else."""
        text = "/".join(map(str, (self.seed, *what)))
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") >> 1

    def generator(self, *what: str | int) -> torch.Generator:
        """Random numbers on the CPU, of `seed_of`."""
        return torch.Generator().manual_seed(self.seed_of(*what))
