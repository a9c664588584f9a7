"""Result of the demo."""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import Field

from graftc.runtime.cli.results.base import CertificateData, DiagnosticData, ReportData, Result
from graftc.specs.base_model import Items

__all__ = ["AgreementData", "DemoData", "ExamplesData", "ScoreData", "ScoresData"]


class ExamplesData(Result):
    """How many examples were used."""

    train: int = Field(ge=0)
    """Of the training split."""

    test: int = Field(ge=0)
    """Of the test split."""


class ScoreData(Result):
    """How good a model is on the test split."""

    accuracy: float = Field(ge=0, le=1)
    """Fraction of examples with the right class."""

    macro_f1: float = Field(ge=0, le=1)
    """Mean over classes of each one's F1."""


class ScoresData(Result):
    """Scores on the test split."""

    before: ScoreData
    """The model before training."""

    after: ScoreData
    """The trained model."""

    baseline: ScoreData | None
    """Logistic regression on frozen embeddings; null in a quick run."""


class AgreementData(Result):
    """How well another form of the trained model agrees with it on the test split."""

    passed: bool
    """Whether the logits keep to the tolerance."""

    same_predictions: float = Field(ge=0, le=1)
    """Fraction of examples with the same predicted class."""

    largest_difference: float = Field(ge=0)
    """Largest absolute difference of logits."""

    tolerance: float = Field(ge=0)
    """What that may be."""


class DemoData(Result):
    """`graftc demo --json`. The exit status is 1 where it did not pass."""

    passed: bool
    """Whether the demo showed all that it promises."""

    failures: Items[str]
    """What it promises and this run did not show."""

    quick: bool
    """Whether a subset of the data was used, without a baseline."""

    examples: ExamplesData
    """How many examples were used."""

    scores: ScoresData
    """Scores on the test split."""

    report: ReportData
    """What the adaptation adds."""

    certificate: CertificateData
    """The evidence for the fold."""

    transformers: AgreementData
    """The folded model, reloaded by plain transformers."""

    onnx: AgreementData
    """The folded model in ONNX Runtime."""

    seconds: Mapping[str, float]
    """How long each stage took."""

    files: Mapping[str, str]
    """What was written, by purpose."""

    out: str
    """The folder that was written to."""

    warnings: Items[DiagnosticData]
    """Warnings."""
