"""Results of the demos."""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import Field

from graftc.cli.results.base import CertificateData, DiagnosticData, ReportData, Result
from graftc.specs.base_model import Items

__all__ = [
    "AgreementData",
    "DemoData",
    "ExamplesData",
    "LLMDemoData",
    "ScoreData",
    "ScoresData",
    "TokensData",
    "TopicAnswerData",
    "TopicScoreData",
    "TopicScoresData",
    "TrainingData",
]


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


class TrainingData(Result):
    """How long the model was trained."""

    steps: int = Field(ge=0)
    """Steps of the optimiser."""

    batch: int = Field(ge=0)
    """Conversations in each."""

    losses_apart: float | None
    """Largest difference of a step's loss from PEFT's, relative to the largest loss; null in a quick run."""


class TopicScoreData(Result):
    """How often a model knows the topic of a test text."""

    likelihood: ScoreData
    """Of the topic whose name is the most probable answer."""

    generation: float = Field(ge=0, le=1)
    """Fraction of texts where the generated answer names the right topic first."""


class TopicScoresData(Result):
    """Scores on the test texts."""

    untuned: TopicScoreData
    """The model as it was."""

    graftc: TopicScoreData
    """The tuned model."""

    peft: TopicScoreData | None
    """The same training with PEFT; null in a quick run."""


class TopicAnswerData(Result):
    """What the model says about a test text."""

    text: str
    """The text, as it was cut."""

    topic: str
    """The right answer."""

    before: str
    """What the untuned model says."""

    after: str
    """What the tuned model says."""


class TokensData(Result):
    """How often another form of the tuned model generates the same tokens."""

    passed: bool
    """Whether all are the same."""

    prompts: int = Field(ge=0)
    """How many prompts were continued."""

    same: int = Field(ge=0)
    """How many of them with the same tokens."""

    tokens: int = Field(ge=0)
    """How many tokens were generated."""


class LLMDemoData(Result):
    """`graftc demo --llm --json`. The exit status is 1 where it did not pass."""

    passed: bool
    """Whether the demo showed all that it promises."""

    failures: Items[str]
    """What it promises and this run did not show."""

    quick: bool
    """Whether it was the short version, without PEFT."""

    examples: ExamplesData
    """How many conversations were used."""

    training: TrainingData
    """How long the model was trained."""

    scores: TopicScoresData
    """Scores on the test texts."""

    answers: Items[TopicAnswerData]
    """Some test texts, with answers before and after."""

    report: ReportData
    """What the adaptation adds."""

    certificate: CertificateData
    """The evidence for the fold."""

    same_tokens: Mapping[str, TokensData]
    """Other forms of the tuned model against the compiled one."""

    seconds: Mapping[str, float]
    """How long each stage took."""

    files: Mapping[str, str]
    """What was written, by purpose."""

    bytes: Mapping[str, int]
    """How large that is, by purpose."""

    out: str
    """The folder that was written to."""

    warnings: Items[DiagnosticData]
    """Warnings."""
