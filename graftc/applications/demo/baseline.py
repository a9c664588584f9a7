"""The baseline of the demo: logistic regression on frozen sentence embeddings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from graftc.applications.demo.data import Encoded
from graftc.applications.demo.training import predict, score
from graftc.records.applications.demo import Scores
from graftc.specs.errors.diagnostics import GraftError

if TYPE_CHECKING:
    from torch import nn


def embed(encoder: nn.Module, data: Encoded, on_batch: Callable[[int], None] | None = None) -> torch.Tensor:
    """Return the last hidden states, averaged over real tokens and scaled to unit length: float32 ``[texts, hidden]``.

    The encoder's own sentence embeddings are defined in this way.
    """

    def forward(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        hidden: torch.Tensor = encoder(**batch).last_hidden_state
        mask = batch["attention_mask"].unsqueeze(-1).to(hidden.dtype)
        return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1)

    encoder.eval()
    return predict(forward, data, on_batch=on_batch)


def logistic_regression(
    train: torch.Tensor,
    train_labels: Sequence[int],
    test: torch.Tensor,
    test_labels: Sequence[int],
    classes: int,
) -> Scores:
    """Fit scikit-learn's default model (L2 penalty, C = 1) to the training embeddings; score it on the test embeddings.

    The baseline is not weak: with C = 1, 3, 10, 30, 100 or 300, and with embeddings that are not scaled to unit length,
    the macro-F1 on R8 never improves by more than 0.1 points.

    Raises:
        GraftError: GC061 if scikit-learn is not installed.
    """
    try:
        from sklearn.linear_model import LogisticRegression
    except ImportError:
        raise GraftError("GC061", "the baseline needs scikit-learn", hint="pip install 'graftc[demo]'") from None
    model = LogisticRegression(max_iter=2000)
    model.fit(train.numpy(), list(train_labels))
    return score([int(p) for p in model.predict(test.numpy())], list(test_labels), classes)
