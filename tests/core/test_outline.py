"""Outlining: what an adaptation makes of tensors alone belongs to its layer's only part."""

from __future__ import annotations

import pytest

import graftc
from graftc.passes.graph.outline import outline
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
