"""The result of the demo, and the check of its promises."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from graftc.applications.demo.training import Scores

__all__ = ["DemoResult", "PredictionAgreement"]


@dataclass(frozen=True)
class PredictionAgreement:
    """The agreement of another form of the trained model with it on the test split.

    Attributes:
        same_predictions: the fraction of examples with the same predicted class.
        largest_difference: the largest absolute difference of logits.
        tolerance: the largest difference that is allowed.
    """

    same_predictions: float
    largest_difference: float
    tolerance: float

    @property
    def passed(self) -> bool:
        """Whether the logits are within the tolerance."""
        return self.largest_difference <= self.tolerance

    def to_json(self) -> dict[str, Any]:
        """Return the agreement as plain data."""
        return {
            "passed": self.passed,
            "same_predictions": self.same_predictions,
            "largest_difference": self.largest_difference,
            "tolerance": self.tolerance,
        }


@dataclass(frozen=True)
class DemoResult:
    """The result of the demo; :attr:`failures` lists the broken promises, if there are any.

    Attributes:
        quick: whether a subset was used, without a baseline.
        examples: the sizes of the training and the test split.
        before, after: scores on the test split, untrained and trained.
        baseline: scores of logistic regression on frozen embeddings; None in a quick run.
        report: the cost of the adaptation, in the form of ``Compiled.report``.
        certificate: the certificate of the fold, in the form of ``Merged.certificate``.
        transformers, onnx: the agreement of the folded model reloaded by plain transformers, and in ONNX Runtime.
        seconds: the duration of each stage.
        files: the names of the written files, by purpose.
    """

    quick: bool
    examples: tuple[int, int]
    before: Scores
    after: Scores
    baseline: Scores | None
    report: dict[str, Any]
    certificate: dict[str, Any]
    transformers: PredictionAgreement
    onnx: PredictionAgreement
    seconds: dict[str, float] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)

    @property
    def failures(self) -> tuple[str, ...]:
        """The promises of the demo that this run did not keep."""
        problems = []
        if self.baseline is not None and self.after.macro_f1 <= self.baseline.macro_f1:
            problems.append("the trained model does not beat the baseline in macro-F1")
        if self.after.accuracy <= self.before.accuracy:
            problems.append("training did not raise the accuracy")
        if not self.certificate.get("passed", False):
            problems.append("the certificate of the fold did not pass")
        if not self.transformers.passed:
            problems.append("the folder reloaded by plain transformers computes something else")
        if not self.onnx.passed:
            problems.append("ONNX Runtime computes something else")
        return tuple(problems)

    @property
    def passed(self) -> bool:
        """Whether there are no :attr:`failures`."""
        return not self.failures

    def to_json(self) -> dict[str, Any]:
        """Return the result as plain data, as written to ``demo.json``."""
        return {
            "passed": self.passed,
            "failures": list(self.failures),
            "quick": self.quick,
            "examples": {"train": self.examples[0], "test": self.examples[1]},
            "scores": {
                "before": self.before.to_json(),
                "after": self.after.to_json(),
                "baseline": None if self.baseline is None else self.baseline.to_json(),
            },
            "report": self.report,
            "certificate": self.certificate,
            "transformers": self.transformers.to_json(),
            "onnx": self.onnx.to_json(),
            "seconds": {name: round(value, 2) for name, value in self.seconds.items()},
            "files": self.files,
        }
