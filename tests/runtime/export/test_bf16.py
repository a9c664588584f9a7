"""ONNX Runtime has no kernels for bfloat16 on CPUs: the export raises an error that names what works instead."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import graftc
from graftc.specs.errors.diagnostics import GraftError
from graftc.testing import perturb
from graftc.testing.families import tiny

SPEC = {"adapt": [{"method": "lora", "rank": 2, "target": {"role": ["attn.q"]}}]}


@pytest.mark.full
@pytest.mark.sample("merged")
@pytest.mark.parametrize("merged", [False, True], ids=["adapted", "merged"])
def test_a_model_in_bfloat16(merged: bool, tmp_path: Path) -> None:
    compiled = graftc.compile(SPEC, tiny("bert").to(torch.bfloat16)).eval()
    perturb(compiled)
    model = compiled.merge() if merged else compiled
    with pytest.raises(GraftError, match="ONNX Runtime cannot run the export: NotImplemented") as caught:
        model.export(tmp_path / "model.onnx")
    assert caught.value.code == "GC060" and "float32 or float16" in str(caught.value.hint)
    assert not list(tmp_path.iterdir())
    model.export(tmp_path / "model.pt2", "pt2")
