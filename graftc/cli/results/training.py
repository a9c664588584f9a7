"""Result of ``graftc pet``."""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import Field

from graftc.cli.results.base import DiagnosticData, Result
from graftc.specs.base_model import Items

__all__ = ["AccuracyData", "PetGenerationData", "PetMemberData", "PetRowsData", "PetRunResult"]


class AccuracyData(Result):
    """What is right, as a fraction; null where there are no such rows."""

    labelled: float | None = Field(ge=0, le=1)
    """Of the labelled rows."""

    test: float | None = Field(ge=0, le=1)
    """Of the test set."""


class PetRowsData(Result):
    """How many rows there are."""

    labelled: int = Field(ge=0)
    """Labelled ones."""

    unlabelled: int = Field(ge=1)
    """Those that the ensemble has labelled."""

    test: int = Field(ge=0)
    """Those that nothing was learned from."""


class PetMemberData(Result):
    """A member of the ensemble."""

    pattern: str
    """The name of its pattern."""

    repetition: int = Field(ge=0)
    """Which of the pattern's members it is, from 0."""

    weight: float = Field(ge=0, le=1)
    """Its weight in the ensemble; all sum to one."""

    untrained: AccuracyData
    """Of its pattern before training."""

    trained: AccuracyData
    """Of the last generation's member."""


class PetGenerationData(Result):
    """A generation behind the first."""

    examples: Items[int]
    """How many unlabelled rows each member learned from."""

    missing: Mapping[str, float]
    """How many rows of each label the sets lack on average, since too few were predicted."""


class PetRunResult(Result):
    """`graftc pet SPEC --json`."""

    spec: str
    """The SPEC argument."""

    data: str
    """The `--data` option."""

    model: str
    """The MODEL argument."""

    out: str
    """The folder of the run; its `classifier` is an artifact."""

    tokenizer: str
    """The folder of the classifier's tokenizer, in that of the run."""

    seed: int = Field(ge=0)
    """Seed of all random numbers."""

    labels: Items[str]
    """The labels, in the order of logits."""

    rows: PetRowsData
    """How many rows there are."""

    members: Items[PetMemberData]
    """The ensemble."""

    generations: Items[PetGenerationData]
    """Generations behind the first; none without `ipet`."""

    ensemble: AccuracyData
    """Of the ensemble."""

    classifier: AccuracyData
    """Of the classifier."""

    warnings: Items[DiagnosticData]
    """Warnings."""
