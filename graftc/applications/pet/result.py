"""The result of a PET run, and its accuracy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from graftc.runtime.compiled import Compiled

Accuracies = Mapping[str, float | None]
"""Accuracies by ``labelled`` and ``test``; None if there are no such rows."""


@dataclass(frozen=True)
class MemberResult:
    """The result of one member of the ensemble.

    Attributes:
        pattern: the name of its pattern.
        repetition: the number of the member among those of the same pattern, from 0.
        weight: the weight in the ensemble; all weights sum to one.
        untrained: the accuracies of its pattern before training.
        trained: the accuracies of the last generation's member; without labels and generations, those of its pattern.
    """

    pattern: str
    repetition: int
    weight: float
    untrained: Accuracies
    trained: Accuracies


@dataclass(frozen=True)
class GenerationResult:
    """The result of a generation after the first.

    Attributes:
        examples: how many unlabelled rows each member learned from.
        missing: how many rows of each label, by name, its members' sets lack on average.
    """

    examples: Sequence[int]
    missing: Mapping[str, float]


@dataclass(frozen=True)
class PetResult:
    """A trained classifier, and the ensemble that it comes from.

    Attributes:
        classifier: the classifier, in eval mode.
        labels: names of the classes, in the order of logits.
        soft_labels: probabilities that the ensemble gives unlabelled rows, ``[rows, labels]``.
        rows: the number of rows of ``labelled``, ``unlabelled`` and ``test``.
        members: the members of the ensemble.
        generations: the generations after the first one.
        ensemble: the accuracies of the ensemble.
        final: the accuracies of the classifier.
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
        """Return everything except the classifier and tensors, as plain data."""
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
