"""The cost of folding, in counted operations: each tensor is folded once, and the total is linear in the layers."""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor

from graftc.passes.core.weights.folds import FoldStep, LazyTensors
from graftc.testing.families import tiny
from tests.kit.counting import calls
from tests.kit.models import adapted
from tests.kit.specs import lora

ROLES = ["attn.q", "attn.k", "attn.v", "attn.o", "ffn.gate", "ffn.up", "ffn.down"]


@pytest.fixture(scope="module")
def models() -> dict[int, Any]:
    """Models that differ only in depth, by their number of layers."""
    return {layers: adapted(tiny("llama", num_hidden_layers=layers), lora(ROLES)) for layers in (2, 4, 8)}


@pytest.mark.full
@pytest.mark.parametrize("layers", [2, 4, 8])
def test_every_site_is_folded_once(layers: int, models: dict[int, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The certificate, the check of its rounding and the tensor itself share one fold."""
    applied: list[str] = []
    original = LazyTensors._apply

    def counted(step: FoldStep, values: dict[str, Tensor]) -> None:
        applied.append(step.site)
        original(step, values)

    monkeypatch.setattr(LazyTensors, "_apply", staticmethod(counted))
    certificate = models[layers].merge().certificate
    assert len(applied) == len(set(applied)) == len(certificate.sites) == 7 * layers


@pytest.mark.full
def test_merging_is_linear_in_layers(models: dict[int, Any]) -> None:
    """Adding four layers costs at most a little over twice as much as adding two."""
    for model in models.values():
        model.merge()  # pays for what is computed only once
    two, four, eight = (calls(model.merge) for model in models.values())
    assert eight - four <= 1.1 * 2 * (four - two)
