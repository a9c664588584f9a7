"""Scaling through the contract that every method inherits, its fold, and stacked on LoRA in both orders."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from graftc_scale.method import ScaleMethod

import graftc
from graftc.extend import GraftError, WeightFold
from graftc.testing import (
    FAMILIES,
    DeploymentContract,
    MethodContract,
    inputs_for,
    largest_difference,
    outputs_of,
    perturb,
    tiny,
)

TARGET = {"role": ["attn.q", "attn.v", "ffn.down"]}
SCALE: dict[str, Any] = {"method": "scale", "target": TARGET}
LORA: dict[str, Any] = {"method": "lora", "target": TARGET, "rank": 4}


class TestScale(MethodContract):
    """The contract, on every family that has a feed-forward layer: all of Mixtral's are experts, which a scale does not
    take."""

    adaptation: ClassVar[dict[str, Any]] = SCALE
    families: ClassVar[tuple[str, ...]] = tuple(family for family in FAMILIES if family != "mixtral")


class TestScaleDeployed(DeploymentContract):
    """Exports and compilation, on one family."""

    adaptation: ClassVar[dict[str, Any]] = SCALE
    families = ("gpt2",)


def test_fold_scales_rows_and_bias() -> None:
    model = tiny("bert")
    compiled = graftc.compile({"adapt": [SCALE]}, model)
    perturb(compiled)
    module = "bert.encoder.layer.0.output.dense"
    scale = compiled.adapter_state_dict()[f"{module}.graftc.scale.scale"].double()
    assert scale.unique().numel() == 48
    folded, base = compiled.merge().folded_state_dict(), model.state_dict()
    weight = scale[:, None] * base[f"{module}.weight"].double()
    assert torch.equal(folded[f"{module}.weight"], weight.float())
    assert torch.equal(folded[f"{module}.bias"], (scale * base[f"{module}.bias"].double()).float())


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_a_fold_that_forgets_the_bias_is_refused(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = graftc.compile({"adapt": [SCALE]}, tiny(family))
    perturb(compiled)
    original = ScaleMethod.fold

    def fold(self: ScaleMethod, spec: Any, site: Any, tensors: Any) -> WeightFold:
        inner = original(self, spec, site, tensors)
        assert isinstance(inner, WeightFold)
        return WeightFold(lambda weight, bias: (inner.apply(weight, bias)[0], bias))

    monkeypatch.setattr(ScaleMethod, "fold", fold)
    with pytest.raises(GraftError) as error:
        compiled.merge(budget=1e9)
    assert error.value.code == "GC051"


@pytest.mark.parametrize("order", [(LORA, SCALE), (SCALE, LORA)], ids=["lora-scale", "scale-lora"])
def test_stacked_with_lora_it_folds_in_order(order: tuple[dict[str, Any], ...]) -> None:
    compiled = graftc.compile({"adapt": [dict(entry) for entry in order]}, tiny("gpt2"))
    perturb(compiled, 0.05)
    compiled.eval()
    inputs = inputs_for(compiled)
    merged = compiled.merge()
    assert largest_difference(outputs_of(merged, inputs), outputs_of(compiled, inputs)) <= 2e-5


def test_the_two_orders_are_two_functions() -> None:
    outputs = []
    for order in ((LORA, SCALE), (SCALE, LORA)):
        compiled = graftc.compile({"adapt": [dict(entry) for entry in order]}, tiny("bert"))
        perturb(compiled, 0.05)
        compiled.eval()
        outputs.append(outputs_of(compiled, inputs_for(compiled)))
    assert largest_difference(*outputs) > 1e-4
