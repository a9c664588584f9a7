"""Tools that put hooks on modules observe the same in a compiled model as in its source."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import graftc
from graftc.testing.families import tiny
from graftc.testing.perturb import perturb

IDS = torch.tensor([[5, 6, 7, 8]])
LORA = {"method": "lora", "rank": 2, "target": {"role": ["attn.q"]}}


@pytest.fixture(scope="module")
def compiled() -> Any:
    model = graftc.compile({"adapt": [LORA]}, tiny("llama")).eval()
    perturb(model, 0.1)
    return model


@pytest.mark.slow
def test_torchinfo_sees_the_sizes_of_all_that_is_computed(compiled: Any) -> None:
    torchinfo = pytest.importorskip("torchinfo")

    def sizes(model: nn.Module) -> dict[str, tuple[list[int], list[int]]]:
        summary = torchinfo.summary(model, input_data={"input_ids": IDS}, verbose=0, depth=9)
        layers = (each for each in summary.summary_list if isinstance(each.module, nn.Linear))
        return {f"{each.var_name} at {each.depth}": (each.input_size, each.output_size) for each in layers}

    source = sizes(copy.deepcopy(compiled.compilation.model).eval())
    assert source.keys() and sizes(compiled) == source
    compiled(input_ids=IDS)
    assert compiled._graftc.stops == frozenset(), "its hooks are gone, and so is the code that they need"


@pytest.mark.slow
@pytest.mark.parametrize("method", ["LayerActivation", "LayerGradientXActivation"])
def test_captum_attributes_to_modules_below_layers(compiled: Any, method: str) -> None:
    captum = pytest.importorskip("captum.attr")
    path = "model.layers.1.mlp.up_proj"

    def attributed(model: nn.Module) -> torch.Tensor:
        score = lambda ids: model(input_ids=ids).logits.flatten(1)[:, -1]  # noqa: E731
        values: torch.Tensor = getattr(captum, method)(score, model.get_submodule(path)).attribute(IDS)
        return values

    source = compiled.compilation.model.eval()
    with compiled.disabled():
        torch.testing.assert_close(attributed(compiled), attributed(source), atol=1e-6, rtol=1e-4)
    merged = copy.deepcopy(source)
    merged.load_state_dict(compiled.merge().state_dict(), strict=False)
    torch.testing.assert_close(attributed(compiled), attributed(merged), atol=1e-6, rtol=1e-4)
