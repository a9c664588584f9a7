"""Heads of models that are split into several graphs: single maps count only if they are called after all layers."""

from __future__ import annotations

from typing import Any

import pytest

import graftc
from tests.runtime.live.models import qwen2_vl

SPEC: dict[str, Any] = {"adapt": [{"method": "lora", "rank": 2, "target": {"role": "head"}}]}


@pytest.mark.full
def test_the_output_projection_alone_is_a_head() -> None:
    case = qwen2_vl()
    roles = graftc.roles(case.model, case.first)
    assert [finding.parameter for finding in roles.findings if finding.role.startswith("head")] == ["lm_head.weight"]
    compiled = graftc.compile(SPEC, case.model, case.first, cache=False)
    assert [str(site.key.module) for site, _ in compiled.compilation.main.resolved[0].places] == ["lm_head"]


@pytest.mark.full
def test_biases_of_maps_between_layers_train() -> None:
    case = qwen2_vl()
    compiled = graftc.compile({"adapt": [{"method": "bitfit"}]}, case.model, case.first, cache=False)
    trained = {name for name, parameter in compiled.named_parameters() if parameter.requires_grad}
    for module in ("model.visual.blocks.0.attn.qkv", "model.visual.merger.mlp.2", "model.visual.blocks.1.mlp.fc2"):
        assert any(name.startswith(module) for name in trained), module
