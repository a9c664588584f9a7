"""Trained copies that are folded with other values than those that were trained."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor

from graftc.passes.core.weights.folds import FoldStep


def fold_other_copies(monkeypatch: pytest.MonkeyPatch, change: Callable[[Tensor], Tensor]) -> None:
    """Fold each trained copy with changed values for the rest of a test.

    Args:
        monkeypatch: the test's patches.
        change: returns the changed values of a copy, of the same shape.
    """
    of_copy = FoldStep.of_copy

    def changed(adaptation: str, site: str, own: Any, value: Callable[[], Tensor]) -> FoldStep:
        return of_copy(adaptation, site, own, lambda: change(value()))

    monkeypatch.setattr(FoldStep, "of_copy", changed)
