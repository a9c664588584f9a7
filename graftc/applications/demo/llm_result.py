"""The result of the demo on a language model, the check of its promises, and the page about it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from graftc.applications.demo.training import Scores

__all__ = ["GAIN", "PEER", "LLMResult", "TokenAgreement", "TopicAnswer", "TopicScores"]

GAIN = 0.20
"""The margin by which the tuned model's accuracies have to exceed the untuned one's."""

PEER = 0.015
"""The allowed distance of the accuracies from those of PEFT, with the same start and the same batches."""


@dataclass(frozen=True)
class TopicScores:
    """How often a model names the right topic of a test text.

    Attributes:
        likelihood: scores of the topic whose name is the most probable first token of the answer.
        generation: the fraction of texts for which greedily generated answers name the right topic first.
    """

    likelihood: Scores
    generation: float

    @property
    def accuracies(self) -> tuple[float, float]:
        """The accuracies by likelihood and by generation."""
        return self.likelihood.accuracy, self.generation

    def to_json(self) -> dict[str, Any]:
        """Return the scores as plain data."""
        return {"likelihood": self.likelihood.to_json(), "generation": round(self.generation, 6)}


@dataclass(frozen=True)
class TokenAgreement:
    """How often another form of the tuned model generates the same tokens.

    Attributes:
        prompts: the number of prompts.
        same: the number of prompts that are continued with exactly the same tokens.
        tokens: the number of generated tokens.
    """

    prompts: int
    same: int
    tokens: int

    @property
    def passed(self) -> bool:
        """Whether all tokens are the same."""
        return self.same == self.prompts

    def to_json(self) -> dict[str, Any]:
        """Return the agreement as plain data."""
        return {"passed": self.passed, "prompts": self.prompts, "same": self.same, "tokens": self.tokens}


@dataclass(frozen=True)
class TopicAnswer:
    """A test text, its topic, and the model's answers before and after tuning."""

    text: str
    topic: str
    before: str
    after: str

    def to_json(self) -> dict[str, str]:
        """Return the answer as plain data."""
        return {"text": self.text, "topic": self.topic, "before": self.before, "after": self.after}


@dataclass(frozen=True)
class LLMResult:
    """The result of the demo on a language model; :attr:`failures` lists the broken promises, if there are any.

    Attributes:
        quick: whether it was the short version, without PEFT.
        examples: the numbers of conversations for training and for testing.
        steps: the number of training steps, and of conversations in each.
        untuned, tuned, peft: scores on the test texts; None for PEFT in a quick run.
        losses_apart: the largest difference of a step's loss from PEFT's, relative to the largest loss.
        answers: some test texts with answers.
        report: the cost of the adaptation, in the form of ``Compiled.report``.
        certificate: the certificate of the fold, in the form of ``Merged.certificate``.
        same_tokens: the agreement of other forms of the tuned model with the compiled one.
        seconds: the duration of each stage.
        files: the names of the written files, by purpose.
        bytes: the sizes of the written files, by purpose.
    """

    quick: bool
    examples: tuple[int, int]
    steps: tuple[int, int]
    untuned: TopicScores
    tuned: TopicScores
    peft: TopicScores | None
    losses_apart: float | None
    answers: tuple[TopicAnswer, ...]
    report: dict[str, Any]
    certificate: dict[str, Any]
    same_tokens: Mapping[str, TokenAgreement]
    seconds: dict[str, float] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    bytes: dict[str, int] = field(default_factory=dict)

    @property
    def failures(self) -> tuple[str, ...]:
        """The promises of the demo that this run did not keep."""
        problems = []
        ways = ("by likelihood", "by generation")
        for way, before, after in zip(ways, self.untuned.accuracies, self.tuned.accuracies, strict=True):
            if not after >= before + GAIN:
                problems.append(f"{way}, tuning did not raise the accuracy by {100 * GAIN:.0f} points")
        if self.peft is not None:
            for way, theirs, ours in zip(ways, self.peft.accuracies, self.tuned.accuracies, strict=True):
                if not abs(theirs - ours) <= PEER:
                    problems.append(f"{way}, the accuracy is more than {100 * PEER:.1f} points from PEFT's")
        if not self.certificate.get("passed", False):
            problems.append("the certificate of the fold did not pass")
        problems += [f"{name} generates other tokens" for name, form in self.same_tokens.items() if not form.passed]
        return tuple(problems)

    @property
    def passed(self) -> bool:
        """Whether there are no :attr:`failures`."""
        return not self.failures

    @property
    def scores(self) -> dict[str, TopicScores]:
        """The scores, by the name of the model or library that reached them."""
        scores = {"untuned": self.untuned, "graftc": self.tuned}
        return scores if self.peft is None else {**scores, "peft": self.peft}

    def to_json(self) -> dict[str, Any]:
        """Return the result as plain data, as written to ``demo.json``."""
        return {
            "passed": self.passed,
            "failures": list(self.failures),
            "quick": self.quick,
            "examples": {"train": self.examples[0], "test": self.examples[1]},
            "training": {"steps": self.steps[0], "batch": self.steps[1], "losses_apart": self.losses_apart},
            "scores": {"peft": None} | {name: scores.to_json() for name, scores in self.scores.items()},
            "answers": [answer.to_json() for answer in self.answers],
            "report": self.report,
            "certificate": self.certificate,
            "same_tokens": {name: form.to_json() for name, form in self.same_tokens.items()},
            "seconds": {name: round(value, 2) for name, value in self.seconds.items()},
            "files": self.files,
            "bytes": self.bytes,
        }

    def page(self) -> str:
        """Return the result as Markdown."""
        lines = [
            "# A language model learns the topics of news",
            "",
            f"SmolLM2-135M-Instruct, {self.steps[0]} steps of {self.steps[1]} conversations; "
            f"accuracy on {self.examples[1]} test texts of Reuters R8.",
            "",
            "| model | by likelihood | by generation | macro-F1, by likelihood |",
            "| --- | ---: | ---: | ---: |",
        ]
        for name, scores in self.scores.items():
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
