"""What folding costs, in operations that are counted: each tensor is folded once, all is linear in layers."""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor

import graftc
from graftc.passes.core.weights.folds import FoldStep, LazyTensors
from graftc.testing import perturb
from tests.counting import calls
from tests.families import tiny

ROLES = ["attn.q", "attn.k", "attn.v", "attn.o", "ffn.gate", "ffn.up", "ffn.down"]


def adapted(layers: int, role: Any = ROLES, **changes: Any) -> Any:
    """A perturbed LoRA at every projection of a Llama with so many layers."""
    spec = {"adapt": [{"method": "lora", "target": {"role": role}, "rank": 2}]}
    compiled = graftc.compile(spec, tiny("llama", num_hidden_layers=layers, **changes)).eval()
    perturb(compiled)
    return compiled


@pytest.fixture(scope="module")
def models() -> dict[int, Any]:
    """Models that differ in depth alone."""
    return {layers: adapted(layers) for layers in (2, 4, 8)}


@pytest.mark.full
@pytest.mark.parametrize("layers", [2, 4, 8])
def test_every_site_is_folded_once(layers: int, models: dict[int, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """For its certificate, for the check of its rounding and for the tensor itself together."""
    applied: list[str] = []
    original = LazyTensors._apply

    def counted(step: FoldStep, values: dict[str, Tensor]) -> None:
        applied.append(step.site)
        original(step, values)

    monkeypatch.setattr(LazyTensors, "_apply", staticmethod(counted))
    certificate = models[layers].merge().certificate
    assert len(applied) == len(set(applied)) == len(certificate.sites) == 7 * layers


@pytest.mark.slow
def test_merging_is_linear_in_layers(models: dict[int, Any]) -> None:
    """What four more layers cost is at most a little over twice of what two more cost."""
    for model in models.values():
        model.merge()  # what is made once
    two, four, eight = (calls(model.merge) for model in models.values())
    assert eight - four <= 1.1 * 2 * (four - two)
