"""Packed weights in exported files: ``.pt2``, and ONNX in every layout of ONNX Runtime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from safetensors.numpy import load_file
from torch import nn
from transformers.pytorch_utils import Conv1D

import graftc
from graftc.passes.core.packing.affine import Affine
from graftc.passes.core.packing.blockwise import Blockwise
from graftc.passes.core.packing.modules import hold_packed, packed_parameter
from graftc.passes.core.packing.ordered import Ordered
from graftc.passes.core.packing.packing import VIA, Packing
from graftc.passes.core.packing.row_scaled import RowScaled
from graftc.runtime.export.onnx_packed import block_of, in_blocks
from graftc.specs.errors.diagnostics import GraftError
from graftc.testing import inputs_for, outputs_of, perturb, tiny
from tests.kit.packed_bases import in_onnx_runtime, on_packed

BOTTLENECK = {"adapt": [{"method": "lora", "rank": 2, "target": {"modules": ["2"]}}]}


@pytest.mark.full
@pytest.mark.parametrize(
    ("family", "method", "kind"), [("gpt2", "lora", "nf4"), ("bert", "dora", "int4"), ("mixtral", "ia3", "int8")]
)
def test_parity(family: str, method: str, kind: str, tmp_path: Path) -> None:
    """A sample of tests/gates/test_quantised_onnx.py."""
    in_onnx_runtime(family, method, kind, tmp_path)


class Layers(nn.Sequential):
    """A linear map, one that is stored transposed, and one whose weight is also read directly."""

    def __init__(self, width: int) -> None:
        super().__init__(nn.Linear(width, 40), nn.Tanh(), Conv1D(24, 40), nn.Linear(24, 10, bias=False))

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input) + (self[3].weight * input.mean()).sum(1)


@pytest.mark.full
@pytest.mark.parametrize(
    ("width", "packing", "operators"),
    [
        (50, Affine("int8"), {"MatMulNBits": 2, "DequantizeLinear": 1}),
        (50, Affine("int8", group=16), {"MatMulNBits": 2, "DequantizeLinear": 1}),
        (50, Affine("int4", group=16), {"MatMulNBits": 2, "DequantizeLinear": 1}),
        (51, Affine("int4", group=48), {"MatMulNBits": 2, "DequantizeLinear": 1}),
        (64, Affine("int4", group=10), {"DequantizeLinear": 3}),
        (50, Blockwise("nf4", group=64), {"MatMulBnb4": 2, "DequantizeLinear": 1}),
        (50, Blockwise("fp4", group=32), {"MatMulBnb4": 2, "DequantizeLinear": 1}),
        (51, Blockwise("nf4", group=64, double=True), {"MatMulBnb4": 2, "DequantizeLinear": 1}),
        (50, Affine("int8", group=10, via=VIA.index(torch.float32)), {"DequantizeLinear": 3}),
        (50, Affine("int4", group=16, via=VIA.index(torch.float16)), {}),
        (50, Blockwise("nf4", group=64, via=VIA.index(torch.bfloat16)), {}),
        (50, Ordered("int4_ordered", group=16, via=VIA.index(torch.float16)), {}),
        (50, RowScaled("int8_rows"), {}),
    ],
    ids=lambda given: given.text if isinstance(given, Packing) else str(given),
)
def test_layouts(width: int, packing: Any, operators: dict[str, int], tmp_path: Path) -> None:
    """All layouts export and agree with the compiled model.

    Rows that are not whole groups, odd widths, groups that no operator has, transposed weights, weights that are not
    only multiplied by, and packings that ONNX has no form for: intermediate rounding, and groups of arbitrary inputs.
    """
    torch.manual_seed(0)
    model = Layers(width).eval()
    nn.init.normal_(model[2].weight)
    for place in (0, 2, 3):
        own = type(packing)(**{**vars(packing), "transposed": place == 2})
        hold_packed(model[place], {"weight": packed_parameter(model[place].weight, own)})
    compiled = graftc.compile(BOTTLENECK, model, {"input": torch.randn(3, width)}).eval()
    perturb(compiled)
    path = compiled.export(tmp_path / "model.onnx", "onnx")
    kinds = [node.op_type for node in onnx.load(path).graph.node]
    assert {name: kinds.count(name) for name in ("MatMulNBits", "MatMulBnb4", "DequantizeLinear") if name in kinds} == (
        operators
    )
    x = torch.randn(5, width)
    (output,) = onnxruntime.InferenceSession(str(path)).run(None, {"input": x.numpy()})
    with torch.no_grad():
        expected = compiled(x)
    np.testing.assert_allclose(output, expected.numpy(), atol=2e-5 * float(expected.abs().max()), rtol=0)


def test_blocks() -> None:
    """Blocks are as large as the groups allow, pad rows little, and contain the values of the groups."""
    assert [block_of(group, 4096) for group in (32, 48, 64, 256, 4096)] == [32, 16, 64, 256, 256]
    assert block_of(24, 4096) is None and block_of(576, 576) == 64 and block_of(50, 50) == 16
    packing = Affine("int4", group=32)
    weight = torch.randn(6, 80)
    parts = packing.packed(weight)
    form = packing.form(parts, weight.shape)
    codes, scales, zeros = in_blocks(form, 16)
    pairs = torch.stack([codes & 15, codes >> 4], -1).flatten(-2).float()
    zero = torch.stack([zeros & 15, zeros >> 4], -1).flatten(-2)[:, :5].float()
    values = ((pairs - zero.unsqueeze(-1)) * scales.unsqueeze(-1)).flatten(1)
    assert torch.equal(values, packing.values(parts, weight.shape, torch.float32))


@pytest.mark.full
@pytest.mark.parametrize(
    ("family", "method", "base"),
    [("llama", "lora", {"double": True}), ("gpt2", "lora", {"double": True}), ("gpt2", "spiel", {})],
)
def test_a_program_of_torch(family: str, method: str, base: dict[str, Any], tmp_path: Path) -> None:
    """A ``.pt2`` file contains codes and no dense weight, and gives bitwise equal outputs.

    This also holds for a method that replaces the weight itself.
    """
    compiled = on_packed(family, method, "nf4", **base)
    loaded = torch.export.load(compiled.export(tmp_path / "model.pt2", "pt2"))
    state = loaded.state_dict
    packed = compiled.compilation.store.packed
    assert all(state[f"{name}_codes"].dtype == torch.uint8 for name in packed)
    assert not any(name in state for name in packed)
    inputs = inputs_for(compiled)
    (expected, *_), outputs = outputs_of(compiled, inputs), loaded.module()(**inputs)
    assert torch.equal(outputs["logits"], expected)


@pytest.mark.full
def test_requantised(tmp_path: Path) -> None:
    """A merge into packed weights exports packed weights."""
    merged = on_packed("bert", "lora", "int8").merge(base="requantized")
    path = merged.export(tmp_path / "model.onnx", "onnx")
    graph = onnx.load(path).graph
    assert sum(node.op_type == "MatMulNBits" for node in graph.node) == 12
    inputs = inputs_for(merged, front=False)
    outputs = onnxruntime.InferenceSession(str(path)).run(None, {name: t.numpy() for name, t in inputs.items()})
    torch.testing.assert_close(torch.from_numpy(outputs[0]), outputs_of(merged, inputs)[0], atol=2e-5, rtol=0)


@pytest.mark.full
def test_adapters_as_inputs(tmp_path: Path) -> None:
    """A file with a packed base can take adapters as inputs."""
    compiled = on_packed("bert", "lora", "int4")
    path = compiled.export(tmp_path / "model.onnx", "onnx", inputs=["lora"])
    session = onnxruntime.InferenceSession(str(path))
    names = {item.name for item in (*session.get_inputs(), *session.get_overridable_initializers())}
    assert not any("weight_" in name for name in names) and not names & set(compiled.compilation.store.packed)
    other = graftc.compile(compiled.spec, tiny("bert")).eval()
    other.load_adapter_state_dict({name: tensor * 2 for name, tensor in compiled.adapter_state_dict().items()})
    inputs = inputs_for(compiled, front=False)
    adapter = load_file(other.export(tmp_path / "other.safetensors", "onnx-adapter", graph=path))
    assert set(adapter) <= names
    feed = {**{name: tensor.numpy() for name, tensor in inputs.items() if name in names}, **adapter}
    outputs = session.run(None, feed)
    torch.testing.assert_close(torch.from_numpy(outputs[0]), outputs_of(other, inputs)[0], atol=2e-5, rtol=0)


@pytest.mark.full
def test_half_precision(tmp_path: Path) -> None:
    """In float16 the weight is dequantised to its own dtype."""
    spec = {
        "adapt": [{"method": "lora", "rank": 2, "target": {"role": ["attn.q"]}}],
        "base": {"quantize": "nf4"},
    }
    compiled = graftc.compile(spec, tiny("gpt2").half()).eval()
    perturb(compiled)
    graph = onnx.load(compiled.export(tmp_path / "model.onnx", "onnx")).graph
    assert sum(node.op_type == "DequantizeLinear" for node in graph.node) == 8


@pytest.mark.full
@pytest.mark.parametrize("kind", ["int8", "int4", "nf4"])
def test_bfloat16(kind: str, tmp_path: Path) -> None:
    """ONNX Runtime does not run bfloat16 on CPUs: the export raises an error and leaves no file."""
    spec = {"adapt": [{"method": "lora", "rank": 2, "target": {"role": ["attn.q"]}}], "base": {"quantize": kind}}
    compiled = graftc.compile(spec, tiny("gpt2").bfloat16()).eval()
    with pytest.raises(GraftError, match=r"GC060: ONNX Runtime cannot run the export(.|\n)*float32 or float16"):
        compiled.export(tmp_path / "model.onnx", "onnx")
    assert not list(tmp_path.iterdir())
