"""Outlining: what an adaptation makes of tensors alone belongs to its layer's only part."""

from __future__ import annotations

import pytest
import torch

import graftc
from graftc.passes.graph.outline import outline
from graftc.testing import largest_difference
from graftc.testing.compare import flat, inputs_for
from tests.families import tiny


@pytest.mark.slow
@pytest.mark.sample("adalora-llama", "sora-gpt2", "dylora-bert", "lora-bert", "lora-llama")
@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
@pytest.mark.parametrize("method", ["adalora", "sora", "dylora", "lora"])
def test_a_layer_is_one_block(family: str, method: str) -> None:
    """Gated and masked factors need no input, and still make no part of the layer before all layers; equal layers have
    equal code."""
    fields = {"target_rank": 2} if method == "adalora" else {}
    entry = {"method": method, "target": {"role": ["attn.q", "attn.o"]}, "rank": 4, **fields}
    compiled = graftc.compile({"adapt": [entry]}, tiny(family))
    for mode in ("train", "eval"):
        found = outline(compiled.program(mode))
        assert [block.use for block in found.blocks] == [0, 0]
        first, second = (block.graph.python_code("self").src for block in found.blocks)
        assert first == second
        inserted = sum(len(block.graph.find_nodes(op="get_attr")) for block in found.blocks)
        assert inserted >= len(compiled.report.adaptations) * 4


@pytest.mark.parametrize("off", [[], ["projections"]])
def test_random_numbers_are_drawn_in_the_order_of_the_source(off: list[str]) -> None:
    """T5 draws for its decoder's embeddings between two stacks, of which the second reads the first one's end in
    every layer."""
    model = tiny("t5")
    spec = {
        "adapt": [{"method": "lora", "rank": 2, "target": {"role": ["attn.{q,k,v,o}", "ffn.{up,down}"]}}],
        "optimise": {"off": off},
    }
    compiled = graftc.compile(spec, model).train()
    inputs, outputs = inputs_for(compiled), []
    for own in (model.train(), compiled):
        torch.manual_seed(3)
        with torch.no_grad():
            outputs.append([leaf for leaf in flat(own(**inputs)) if leaf.is_floating_point()])
    assert largest_difference(*outputs) <= 1e-5
