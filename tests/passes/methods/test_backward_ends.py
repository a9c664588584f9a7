"""The backward pass ends at the lowest place that trains: below it nothing is saved for it and nothing runs in it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

import graftc
from graftc.testing.compare import inputs_for
from graftc.testing.families import tiny

LAYERS = {
    "bert": "bert.encoder.layer",
    "gpt2": "transformer.h",
    "gpt_neox": "gpt_neox.layers",
    "llama": "model.layers",
    "mixtral": "model.layers",
}


@pytest.mark.slow
@pytest.mark.sample("rows-gpt2")
@pytest.mark.parametrize("family", LAYERS)
@pytest.mark.parametrize(
    "entry",
    [
        {"method": "last_layers", "count": 1},
        {"method": "rows", "n_of_m": [1, 4], "target": {"role": "attn.q", "layers": -1}},
        {"method": "lora", "rank": 2, "dropout": 0.1, "target": {"role": "attn.q", "layers": -1}},
    ],
    ids=lambda entry: entry["method"],
)
def test_nothing_is_below_the_last_layer(family: str, entry: Mapping[str, Any]) -> None:
    """The layer's input has no gradient, no tensor of the layer before is saved, and trained tensors get gradients."""
    compiled = graftc.compile({"adapt": [dict(entry)]}, tiny(family)).train()
    inputs = {**inputs_for(compiled), "output_hidden_states": True}
    compiled(**inputs)  # captures the graph for these flags
    layers = [compiled.get_submodule(f"{LAYERS[family]}.{number}") for number in range(2)]
    running: list[int] = []
    kept = [0, 0]
    for number, layer in enumerate(layers):
        layer.register_forward_pre_hook(lambda *_, number=number: running.append(number))
        layer.register_forward_hook(lambda *_: running.clear())

    def keep(tensor: Tensor) -> Tensor:
        for number in running:
            kept[number] += 1
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        outputs = compiled(**inputs)
    first, entering, leaving = outputs.hidden_states
    assert not first.requires_grad and entering.grad_fn is None and not entering.requires_grad
    assert leaving.requires_grad
    assert kept[0] == 0 and kept[1] > 0
    leaving.square().sum().backward()
    grads = [p.grad for p in compiled.parameters() if p.requires_grad]
    assert grads and any(grad is not None and bool(grad.any()) for grad in grads)
