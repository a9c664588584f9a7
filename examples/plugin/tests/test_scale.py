"""Scaling through the contract that every method inherits, and stacked on LoRA in both orders."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest

import graftc
from graftc.testing import MethodContract, largest_difference, outputs_of, perturb, tiny
from graftc.testing.compare import inputs_for

TARGET = {"role": ["attn.q", "attn.v", "ffn.down"]}
SCALE: dict[str, Any] = {"method": "scale", "target": TARGET}
LORA: dict[str, Any] = {"method": "lora", "target": TARGET, "rank": 4}


class TestScale(MethodContract):
    """The contract, on every family."""

    adaptation: ClassVar[dict[str, Any]] = SCALE


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
