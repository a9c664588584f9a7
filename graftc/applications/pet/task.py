"""A run of the recipe: the state that its parts share, and the random number generator of each part."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from graftc.applications.pet.encoding import ClozeEncoder
from graftc.applications.pet.stages import KeptStages
from graftc.specs.pet.document import PetSpec

Fields = Mapping[str, str]
"""The texts of a row, by name."""


@dataclass(frozen=True)
class Examples:
    """Texts, with their labels if these are known.

    Attributes:
        texts: the fields of each row.
        labels: the index of each row's label; empty for rows without labels.
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
    """A member of the ensemble.

    Attributes:
        number: the member's index in the ensemble.
        pattern: the index of its pattern.
        repetition: the member's index among the members with the same pattern.
    """

    number: int
    pattern: int
    repetition: int


@dataclass(frozen=True)
class Task:
    """The state that all stages of a run read.

    Attributes:
        spec: the document.
        model: the language model; it is never changed.
        encoder: the encoder that puts texts into patterns.
        labelled, unlabelled, test: the rows; test rows are answered, but never used for training.
        seed: the seed for all random numbers.
        stages: the finished stages.
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
        """The members of the ensemble: one for each pattern and repetition."""
        both = [(pattern, each) for pattern in range(len(self.spec.patterns)) for each in range(self.spec.seeds)]
        return tuple(EnsembleMember(number, pattern, each) for number, (pattern, each) in enumerate(both))

    @property
    def asked(self) -> dict[str, Examples]:
        """The rows that members answer, by name; empty sets are omitted."""
        every = {"labelled": self.labelled, "unlabelled": self.unlabelled, "test": self.test}
        return {name: rows for name, rows in every.items() if len(rows)}

    def seed_of(self, *what: str | int) -> int:
        """Return a seed below 2^31 that depends only on the run's seed and the given purpose."""
        text = "/".join(map(str, (self.seed, *what)))
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") >> 1

    def generator(self, *what: str | int) -> torch.Generator:
        """Return a random number generator on the CPU, seeded by `seed_of`."""
        return torch.Generator().manual_seed(self.seed_of(*what))
