"""The config of a merged folder can be read by engines that know only transformers 4."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import graftc
from graftc.testing import perturb
from graftc.testing.families import tiny


@pytest.mark.parametrize(
    ("family", "rotates"), [("llama", True), ("bert", False), pytest.param("mixtral", True, marks=pytest.mark.full)]
)
def test_the_base_of_the_rotation(family: str, rotates: bool, tmp_path: Path) -> None:
    """The rotation's base is at the top level and where transformers 5 has it, which loads the same model."""
    from transformers import AutoConfig

    spec = {"adapt": [{"method": "lora", "rank": 2, "target": {"role": "attn.q"}}]}
    compiled: Any = graftc.compile(spec, tiny(family).eval()).eval()
    perturb(compiled)
    merged = compiled.merge()
    merged.save(tmp_path / "merged")
    data = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert ("rope_theta" in data) == rotates
    config = AutoConfig.from_pretrained(tmp_path / "merged")
    loaded = type(merged.to_transformers()).from_pretrained(tmp_path / "merged").eval()
    if rotates:
        assert data["rope_theta"] == data["rope_parameters"]["rope_theta"]
        assert config.rope_parameters == compiled.config.rope_parameters
    ids = torch.randint(3, 90, (2, 6), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids).logits, merged.to_transformers()(input_ids=ids).logits)
