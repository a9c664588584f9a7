"""The contents of an ONNX file other than numbers: the model's own names, dynamic axes, metadata.

The contract of LoRA's deployment checks for every family that ONNX Runtime agrees. Some tests check when no file is
written.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import graftc
from graftc.specs.errors.diagnostics import GraftError
from graftc.testing import largest_difference, outputs_of
from graftc.testing.compare import SHAPES, inputs_for
from graftc.testing.deployment import check_onnx
from tests.kit.models import adapted

SPEC = {"adapt": [{"method": "lora", "target": {"role": ["attn.q", "attn.v", "ffn.down"]}, "rank": 4, "dropout": 0.1}]}


@pytest.mark.full
@pytest.mark.parametrize("family", ["bert", pytest.param("vit", marks=pytest.mark.full)])
def test_folded(family: str, tmp_path: Path) -> None:
    """The file agrees within 1e-4 at three shapes that were not captured, is valid, has metadata and no adapters."""
    import onnx

    compiled = adapted(family, **SPEC)
    merged = compiled.merge()
    path = merged.export(tmp_path / "model.onnx")
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]
    for sizes in SHAPES:
        check_onnx(path, merged, sizes, 1e-4)
        assert check_onnx(path, compiled, sizes, 1e-4) < 1e-4

    onnx.checker.check_model(str(path), full_check=True)
    model = onnx.load(path)
    program = compiled.program("eval")
    assert tuple(value.name for value in model.graph.input) == program.signature
    assert [value.name for value in model.graph.output] == ["logits"]
    for value, spec in zip(model.graph.input, program.inputs, strict=True):
        dims = [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        assert dims == list(spec.shape)
    assert (model.graph.output[0].type.tensor_type.shape.dim[0].dim_param) == "batch"

    metadata = {entry.key: entry.value for entry in model.metadata_props}
    assert set(metadata) >= {"graftc.spec", "graftc.fingerprint", "graftc.certificate"}
    certificate = json.loads(metadata["graftc.certificate"])
    assert certificate == json.loads(json.dumps(merged.certificate.to_json()))
    assert certificate["passed"] is True
    assert metadata["graftc.fingerprint"] == certificate["fingerprint"]
    written = tmp_path / "spec.yaml"
    written.write_text(metadata["graftc.spec"])
    assert graftc.load_spec(written) == compiled.spec
    assert not [node for node in model.graph.node if "graftc.lora" in str(node)]


@pytest.mark.full
def test_large_weights_lie_beside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights over the limit go into a file of their own, which can be moved together with the model."""
    from graftc.runtime.export import onnx as writer

    monkeypatch.setattr(writer, "LARGE", 1000)
    merged = adapted("bert", **SPEC).merge()
    path = merged.export(tmp_path / "out" / "model.onnx")
    assert sorted(file.name for file in path.parent.iterdir()) == ["model.onnx", "model.onnx.data"]
    moved = path.parent.rename(tmp_path / "moved") / "model.onnx"
    check_onnx(moved, merged, SHAPES[0], 1e-4)
    with pytest.raises(GraftError) as error:
        merged.export(tmp_path / "moved" / "model.onnx")
    assert error.value.code == "GC063"


@pytest.mark.full
def test_existing_file_is_kept(tmp_path: Path) -> None:
    """An export never replaces a file, and fails before any work."""
    path = tmp_path / "model.onnx"
    path.write_text("mine")
    with pytest.raises(GraftError) as error:
        adapted("bert", **SPEC).export(path)
    assert error.value.code == "GC063"
    assert path.read_text() == "mine"


@pytest.mark.slow
def test_unknown_format(tmp_path: Path) -> None:
    """The error names the formats."""
    with pytest.raises(GraftError, match="onnx, onnx-generate or pt2") as error:
        adapted("bert", **SPEC).export(tmp_path / "model.bin", format="bin")
    assert error.value.code == "GC060"
    assert not list(tmp_path.iterdir())


@pytest.mark.full
def test_a_file_that_disagrees_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ONNX Runtime checks the file before it is put in place; without agreement there is no file."""
    import onnx

    from graftc.runtime.export import onnx as writer

    def save_wrongly(model: object, path: Path) -> None:
        save(model, path)
        stored = onnx.load(path)
        weight = max(stored.graph.initializer, key=lambda own: len(own.raw_data))
        weight.CopyFrom(
            onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(weight) * np.float32(1.05), weight.name)
        )
        onnx.save(stored, path)

    save = writer.save_onnx
    monkeypatch.setattr(writer, "save_onnx", save_wrongly)
    with pytest.raises(GraftError, match="differs from torch") as error:
        adapted("bert", **SPEC).merge().export(tmp_path / "model.onnx")
    assert error.value.code == "GC060"
    assert not list(tmp_path.iterdir())


@pytest.mark.full
def test_training_goes_on_after_an_export(tmp_path: Path) -> None:
    """Exporting leaves a compiled model's mode, tensors and outputs unchanged; an unfolded file has no certificate."""
    import onnx

    compiled = adapted("llama", **SPEC)
    inputs = inputs_for(compiled)
    before = outputs_of(compiled, inputs)
    compiled.train()
    path = compiled.export(tmp_path / "model.onnx")
    assert compiled.training
    keys = {entry.key for entry in onnx.load(path).metadata_props}
    assert "graftc.spec" in keys
    assert "graftc.certificate" not in keys
    assert largest_difference(outputs_of(compiled, inputs), before) == 0
    compiled(**inputs).logits.sum().backward()
    assert all(p.grad is not None for p in compiled.parameters() if p.requires_grad)
    assert not any(isinstance(p, torch._subclasses.FakeTensor) for p in compiled.parameters())
