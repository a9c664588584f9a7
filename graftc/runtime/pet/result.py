"""What a run of PET has made, and how good it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from graftc.runtime.compiled import Compiled

Accuracies = Mapping[str, float | None]
"""By ``labelled`` and ``test``; None where there are no such rows."""


@dataclass(frozen=True)
class MemberResult:
    """A member of the ensemble.

    Attributes:
        pattern: the name of its pattern.
        repetition: which of the pattern's members it is, from 0.
        weight: in the ensemble; all sum to one.
        untrained: what its pattern got right before training.
        trained: what the last generation's member gets right; without labels and generations that of its pattern.
    """

    pattern: str
    repetition: int
    weight: float
    untrained: Accuracies
    trained: Accuracies


@dataclass(frozen=True)
class GenerationResult:
    """A generation behind the first.

    Attributes:
        examples: how many unlabelled rows each member learned from.
        missing: of each label by name, how many rows its members' sets lack on average.
    """

    examples: Sequence[int]
    missing: Mapping[str, float]


@dataclass(frozen=True)
class PetResult:
    """A trained classifier, and where it comes from.

    Attributes:
        classifier: in eval mode.
        labels: names of the classes, in the order of logits.
        soft_labels: probabilities that the ensemble gives unlabelled rows, ``[rows, labels]``.
        rows: how many there are: ``labelled``, ``unlabelled``, ``test``.
        members: of the ensemble.
        generations: behind the first one.
        ensemble: what it gets right.
        final: what the classifier gets right.
    """

    classifier: Compiled
    labels: Sequence[str]
    soft_labels: Tensor
    rows: Mapping[str, int]
    members: Sequence[MemberResult]
    generations: Sequence[GenerationResult]
    ensemble: Accuracies
    final: Accuracies

    def to_json(self) -> dict[str, Any]:
        """All but tensors, as plain data."""
        return {
            "labels": list(self.labels),
            "rows": dict(self.rows),
            "members": [
                {
                    "pattern": member.pattern,
                    "repetition": member.repetition,
                    "weight": member.weight,
                    "untrained": dict(member.untrained),
                    "trained": dict(member.trained),
                }
                for member in self.members
            ],
            "generations": [
                {"examples": list(each.examples), "missing": dict(each.missing)} for each in self.generations
            ],
            "ensemble": dict(self.ensemble),
            "classifier": dict(self.final),
        }
