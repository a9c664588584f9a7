"""The results of the demos."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from annotated_types import Ge, Le

from graftc.records.certificate import Certificate
from graftc.records.report import Report
from graftc.records.results import CommandResult
from graftc.specs.records.record import Record, stated

GAIN = 0.20
"""The margin by which the tuned model's accuracies have to exceed the untuned one's."""

PEER = 0.015
"""The allowed distance of the accuracies from those of PEFT, with the same start and the same batches."""


@dataclass(frozen=True)
class ExampleCounts(Record, published="ExamplesData"):
    """How many examples were used."""

    train: Annotated[int, Ge(0)]
    """Of the training split."""

    test: Annotated[int, Ge(0)]
    """Of the test split."""


@dataclass(frozen=True)
class Scores(Record, published="ScoreData"):
    """How good a model is on the test split."""

    accuracy: Annotated[float, Ge(0), Le(1)]
    """Fraction of examples with the right class."""

    macro_f1: Annotated[float, Ge(0), Le(1)]
    """Mean over classes of each one's F1."""

    def to_json(self) -> dict[str, Any]:
        """Return plain data, rounded to six digits."""
        return {name: round(value, 6) for name, value in super().to_json().items()}


@dataclass(frozen=True)
class DemoScores(Record, published="ScoresData"):
    """Scores on the test split."""

    before: Scores
    """The model before training."""

    after: Scores
    """The trained model."""

    baseline: Scores | None
    """Logistic regression on frozen embeddings; null in a quick run."""


@dataclass(frozen=True)
class PredictionAgreement(Record, published="AgreementData", behind={"": ("passed",)}):
    """How well another form of the trained model agrees with it on the test split."""

    same_predictions: Annotated[float, Ge(0), Le(1)]
    """Fraction of examples with the same predicted class."""

    largest_difference: Annotated[float, Ge(0)]
    """Largest absolute difference of logits."""

    tolerance: Annotated[float, Ge(0)]
    """The largest difference that is allowed."""

    @stated
    def passed(self) -> bool:
        """Whether the logits keep to the tolerance."""
        return self.largest_difference <= self.tolerance


@dataclass(frozen=True, kw_only=True)
class DemoOutcome(CommandResult):
    """Fields common to both demos."""

    report: Report
    """The cost of the adaptation."""

    certificate: Certificate
    """The evidence for the fold."""

    seconds: Mapping[str, float]
    """How long each stage took."""

    files: Mapping[str, str]
    """The written files and folders, by purpose."""

    out: str = ""
    """The folder that was written to."""

    @property
    def failures(self) -> tuple[str, ...]:
        """The promises of the demo that this run did not keep."""
        raise NotImplementedError

    @stated
    def passed(self) -> bool:
        """Whether the demo showed all that it promises."""
        return not self.failures


_END = ("seconds", "files", "out", "warnings")


@dataclass(frozen=True, kw_only=True)
class DemoResult(
    DemoOutcome,
    published="DemoData",
    behind={"": ("passed", "failures"), "scores": ("report", "certificate"), "onnx": _END},
):
    """`graftc demo --json`. The exit status is 1 where it did not pass."""

    quick: bool
    """Whether a subset of the data was used, without a baseline."""

    examples: ExampleCounts
    """How many examples were used."""

    scores: DemoScores
    """Scores on the test split."""

    transformers: PredictionAgreement
    """The folded model, reloaded by plain transformers."""

    onnx: PredictionAgreement
    """The folded model in ONNX Runtime."""

    @stated
    def failures(self) -> tuple[str, ...]:
        """The promises of the demo that this run did not keep."""
        problems = []
        if self.scores.baseline is not None and self.scores.after.macro_f1 <= self.scores.baseline.macro_f1:
            problems.append("the trained model does not beat the baseline in macro-F1")
        if self.scores.after.accuracy <= self.scores.before.accuracy:
            problems.append("training did not raise the accuracy")
        if not self.certificate.passed:
            problems.append("the certificate of the fold did not pass")
        if not self.transformers.passed:
            problems.append("the folder reloaded by plain transformers computes something else")
        if not self.onnx.passed:
            problems.append("ONNX Runtime computes something else")
        return tuple(problems)


@dataclass(frozen=True)
class DemoTraining(Record, published="TrainingData"):
    """How long the model was trained."""

    steps: Annotated[int, Ge(0)]
    """Steps of the optimiser."""

    batch: Annotated[int, Ge(0)]
    """Conversations in each."""

    losses_apart: float | None
    """Largest difference of a step's loss from PEFT's, relative to the largest loss; null in a quick run."""


@dataclass(frozen=True)
class TopicScores(Record, published="TopicScoreData"):
    """How often a model knows the topic of a test text."""

    likelihood: Scores
    """Of the topic whose name is the most probable answer."""

    generation: Annotated[float, Ge(0), Le(1)]
    """Fraction of texts where the generated answer names the right topic first."""

    def to_json(self) -> dict[str, Any]:
        """Return plain data, rounded to six digits."""
        return {**super().to_json(), "generation": round(self.generation, 6)}

    @property
    def accuracies(self) -> tuple[float, float]:
        """The accuracies by likelihood and by generation."""
        return self.likelihood.accuracy, self.generation


@dataclass(frozen=True)
class AllTopicScores(Record, published="TopicScoresData"):
    """Scores on the test texts."""

    untuned: TopicScores
    """The model as it was."""

    graftc: TopicScores
    """The tuned model."""

    peft: TopicScores | None
    """A model that PEFT tuned in the same way; null in a quick run."""

    @property
    def by_name(self) -> dict[str, TopicScores]:
        """The scores, by the name of the model or library that reached them."""
        scores = {"untuned": self.untuned, "graftc": self.graftc}
        return scores if self.peft is None else {**scores, "peft": self.peft}


@dataclass(frozen=True)
class TopicAnswer(Record):
    """The model's answers for a test text."""

    text: str
    """The text, as it was cut."""

    topic: str
    """The right answer."""

    before: str
    """The untuned model's answer."""

    after: str
    """The tuned model's answer."""


@dataclass(frozen=True)
class TokenAgreement(Record, published="TokensData", behind={"": ("passed",)}):
    """How often another form of the tuned model generates the same tokens."""

    prompts: Annotated[int, Ge(0)]
    """How many prompts were continued."""

    same: Annotated[int, Ge(0)]
    """How many of them with the same tokens."""

    tokens: Annotated[int, Ge(0)]
    """How many tokens were generated."""

    @stated
    def passed(self) -> bool:
        """Whether all are the same."""
        return self.same == self.prompts


@dataclass(frozen=True, kw_only=True)
class LLMResult(
    DemoOutcome,
    published="LLMDemoData",
    behind={
        "": ("passed", "failures"),
        "answers": ("report", "certificate"),
        "same_tokens": ("seconds", "files", "bytes", "out", "warnings"),
    },
):
    """`graftc demo --llm --json`. The exit status is 1 where it did not pass."""

    quick: bool
    """Whether it was the short version, without PEFT."""

    examples: ExampleCounts
    """How many conversations were used."""

    training: DemoTraining
    """How long the model was trained."""

    scores: AllTopicScores
    """Scores on the test texts."""

    answers: tuple[TopicAnswer, ...]
    """Some test texts, with answers before and after."""

    same_tokens: Mapping[str, TokenAgreement]
    """Other forms of the tuned model against the compiled one."""

    bytes: Mapping[str, int]
    """How large that is, by purpose."""

    @stated
    def failures(self) -> tuple[str, ...]:
        """The promises of the demo that this run did not keep."""
        problems = []
        ways = ("by likelihood", "by generation")
        for way, before, after in zip(ways, self.scores.untuned.accuracies, self.scores.graftc.accuracies, strict=True):
            if not after >= before + GAIN:
                problems.append(f"{way}, tuning did not raise the accuracy by {100 * GAIN:.0f} points")
        if self.scores.peft is not None:
            for way, theirs, ours in zip(ways, self.scores.peft.accuracies, self.scores.graftc.accuracies, strict=True):
                if not abs(theirs - ours) <= PEER:
                    problems.append(f"{way}, the accuracy is more than {100 * PEER:.1f} points from PEFT's")
        if not self.certificate.passed:
            problems.append("the certificate of the fold did not pass")
        problems += [f"{name} generates other tokens" for name, form in self.same_tokens.items() if not form.passed]
        return tuple(problems)

    def page(self) -> str:
        """Return the result as Markdown."""
        lines = [
            "# A language model learns the topics of news",
            "",
            f"SmolLM2-135M-Instruct, {self.training.steps} steps of {self.training.batch} conversations; "
            f"accuracy on {self.examples.test} test texts of Reuters R8.",
            "",
            "| model | by likelihood | by generation | macro-F1, by likelihood |",
            "| --- | ---: | ---: | ---: |",
        ]
        for name, scores in self.scores.by_name.items():
            values = (*scores.accuracies, scores.likelihood.macro_f1)
            lines.append(f"| {name} | " + " | ".join(f"{100 * value:.1f} %" for value in values) + " |")
        lines += ["", "## Answers", "", "| text | topic | before | after |", "| --- | --- | --- | --- |"]
        lines += ["| " + " | ".join(map(_cell, (a.text, a.topic, a.before, a.after))) + " |" for a in self.answers]
        lines += ["", "## The same tokens", ""]
        lines += [
            f"- {name}: {form.same} of {form.prompts} prompts, {form.tokens} tokens"
            for name, form in self.same_tokens.items()
        ]
        lines += ["", "## Files", "", "| what | name | MB |", "| --- | --- | ---: |"]
        lines += [f"| {purpose} | {self.files[purpose]} | {size / 1e6:,.1f} |" for purpose, size in self.bytes.items()]
        lines += ["", "## Seconds", "", "| stage | s |", "| --- | ---: |"]
        lines += [f"| {name} | {value:.1f} |" for name, value in self.seconds.items()]
        return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
