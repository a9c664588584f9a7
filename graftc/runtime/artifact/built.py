"""The `Built` record of a model, as stored in files."""

from __future__ import annotations

from torch import nn

from graftc.compiler.capture.identity.fingerprint import settings_of
from graftc.compiler.capture.interface import dtype_of
from graftc.runtime.sources.reference import MOST_LABELS, Built


def built_of(model: nn.Module) -> Built:
    """Return how a model was built."""
    labels = getattr(getattr(model, "config", None), "id2label", None)
    numbered = isinstance(labels, dict) and list(labels) == list(range(len(labels))) and len(labels) <= MOST_LABELS
    return Built(
        type(model).__name__,
        tuple(map(str, labels.values())) if labels and numbered else None,
        str(dtype_of(model)).removeprefix("torch."),
        settings_of(getattr(model, "config", None)),
    )
