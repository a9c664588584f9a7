"""Tools that put hooks on modules observe the same in a compiled model as in its source."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from tests.kit.models import adapted

IDS = torch.tensor([[5, 6, 7, 8]])
LORA = {"method": "lora", "rank": 2, "target": {"role": ["attn.q"]}}


@pytest.fixture(scope="module")
def llama() -> Any:
    return adapted("llama", LORA, noise=0.1)


@pytest.mark.full
def test_torchinfo_sees_the_sizes_of_all_that_is_computed(llama: Any) -> None:
    torchinfo = pytest.importorskip("torchinfo")

    def sizes(model: nn.Module) -> dict[str, tuple[list[int], list[int]]]:
        summary = torchinfo.summary(model, input_data={"input_ids": IDS}, verbose=0, depth=9)
        layers = (each for each in summary.summary_list if isinstance(each.module, nn.Linear))
        return {f"{each.var_name} at {each.depth}": (each.input_size, each.output_size) for each in layers}

    source = sizes(copy.deepcopy(llama.compilation.model).eval())
    assert source.keys() and sizes(llama) == source
    llama(input_ids=IDS)
    assert llama._graftc.stops == frozenset(), "its hooks are gone, and so is the code that they need"


@pytest.mark.slow
@pytest.mark.parametrize("method", ["LayerActivation", "LayerGradientXActivation"])
def test_captum_attributes_to_modules_below_layers(llama: Any, method: str) -> None:
    captum = pytest.importorskip("captum.attr")
    path = "model.layers.1.mlp.up_proj"

    def attributed(model: nn.Module) -> torch.Tensor:
        score = lambda ids: model(input_ids=ids).logits.flatten(1)[:, -1]  # noqa: E731
        values: torch.Tensor = getattr(captum, method)(score, model.get_submodule(path)).attribute(IDS)
        return values

    source = llama.compilation.model.eval()
    with llama.disabled():
        torch.testing.assert_close(attributed(llama), attributed(source), atol=1e-6, rtol=1e-4)
    merged = copy.deepcopy(source)
    merged.load_state_dict(llama.merge().state_dict(), strict=False)
    torch.testing.assert_close(attributed(llama), attributed(merged), atol=1e-6, rtol=1e-4)
