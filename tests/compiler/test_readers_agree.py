"""Roles and sites read the same maps from a graph."""

from __future__ import annotations

import pytest

import graftc
from graftc.compiler.roles.flow import Flow
from graftc.passes.core.ir.shapes import Sizes
from graftc.passes.core.sites.readers import linear_use
from graftc.passes.core.sites.uses import Experts, Lookup
from graftc.testing import FAMILIES
from graftc.testing.families import tiny

SPEC = {"adapt": [{"method": "lora", "rank": 2, "target": {"role": "attn.q"}}]}


@pytest.mark.slow
@pytest.mark.sample("roberta", "gpt_neox", "llama", "t5", "vit")
@pytest.mark.parametrize("family", FAMILIES)
def test_every_use_is_a_map_of_the_same_operands(family: str) -> None:
    base = graftc.compile(SPEC, tiny(family)).compilation.program("train", "base")
    flow = Flow(base.graph, Sizes(lambda symbol: 4))
    uses = [use for node in base.graph.nodes if (use := linear_use(node)) is not None and not isinstance(use, Lookup)]
    assert uses
    for use in uses:
        linear = flow.linears.get(use.node) or flow.depthwise.get(use.node)
        assert linear is not None, use.node
        assert linear.input is use.input and linear.parameter == use.weight.tensor
        assert linear.experts == isinstance(use, Experts)
        if not linear.experts:
            assert linear.out == use.out_features
