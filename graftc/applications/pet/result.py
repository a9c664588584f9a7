"""The result of a PET run, with its accuracies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from graftc.records.applications.pet import Accuracy, PetGeneration, PetMember, PetRows
from graftc.runtime.compiled import Compiled


@dataclass(frozen=True)
class PetResult:
    """A trained classifier, and the ensemble from which it learned.

    Attributes:
        classifier: the classifier, in eval mode.
        labels: the names of the classes, in the order of the logits.
        soft_labels: the ensemble's probabilities for the unlabelled rows, ``[rows, labels]``.
        rows: the number of labelled, unlabelled and test rows.
        members: the members of the ensemble.
        generations: the generations after the first one.
        ensemble: the ensemble's accuracies.
        final: the classifier's accuracies.
    """

    classifier: Compiled
    labels: Sequence[str]
    soft_labels: Tensor
    rows: PetRows
    members: Sequence[PetMember]
    generations: Sequence[PetGeneration]
    ensemble: Accuracy
    final: Accuracy

    def to_json(self) -> dict[str, Any]:
        """Return everything except the classifier and the tensors, as plain data."""
        return {
            "labels": list(self.labels),
            "rows": self.rows.to_json(),
            "members": [member.to_json() for member in self.members],
            "generations": [generation.to_json() for generation in self.generations],
            "ensemble": self.ensemble.to_json(),
            "classifier": self.final.to_json(),
        }
