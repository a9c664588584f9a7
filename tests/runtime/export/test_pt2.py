"""``.pt2`` files load in torch alone and give equal outputs, up to rounding."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import graftc
from graftc.testing import largest_difference, outputs_of, perturb
from graftc.testing.compare import SHAPES, inputs_for
from graftc.testing.families import tiny


@pytest.mark.slow
@pytest.mark.sample("gpt2-False")
@pytest.mark.parametrize(
    ("family", "fold"),
    [
        ("bert", True),
        ("gpt2", False),
        pytest.param("llama", True, marks=pytest.mark.full),
        pytest.param("vit", True, marks=pytest.mark.full),
    ],
)
def test_round_trip(family: str, fold: bool, tmp_path: Path) -> None:
    """A loaded program accepts every size and returns outputs by name; spec and certificate are in the file."""
    spec = {"adapt": [{"method": "lora", "target": {"role": ["attn.q", "ffn.down"]}, "rank": 4, "dropout": 0.1}]}
    compiled = graftc.compile(spec, tiny(family))
    perturb(compiled)
    runner = compiled.merge() if fold else compiled
    path = runner.export(tmp_path / "model.pt2", format="pt2")
    assert [file.name for file in tmp_path.iterdir()] == ["model.pt2"]
    extra = {"graftc.spec": "", "graftc.fingerprint": "", **({"graftc.certificate": ""} if fold else {})}
    module = torch.export.load(path, extra_files=extra).module()
    for sizes in SHAPES:
        inputs = inputs_for(compiled, sizes)
        outputs = module(**inputs)
        assert list(outputs) == ["logits"]
        assert largest_difference([outputs["logits"]], outputs_of(runner, inputs)) <= 1e-5
    written = tmp_path / "spec.yaml"
    written.write_text(extra["graftc.spec"])
    assert graftc.load_spec(written) == compiled.spec
    if fold:
        assert json.loads(extra["graftc.certificate"])["passed"] is True
