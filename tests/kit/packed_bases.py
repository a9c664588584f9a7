"""Tiny adapted models on quantised bases, and on bases of the dequantised values."""

from __future__ import annotations

import copy
from functools import cache
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import torch
from torch import nn

import graftc
from graftc.compiler.resolve.untie import sharing_copy
from graftc.passes.core.packing.modules import hold_values
from graftc.testing import inputs_for, largest_difference, outputs_of
from tests.kit.models import adapted

FAMILIES = ("bert", "gpt2", "llama", "mixtral", "t5")
KINDS = ("int8", "int4", "nf4")
FOLDING: dict[str, dict[str, Any]] = {
    "lora": {"rank": 2},
    "dora": {"rank": 2},
    "adalora": {"rank": 3},
    "ia3": {},
    "spiel": {"density": 0.05},
}
STAYING: dict[str, dict[str, Any]] = {"bottleneck": {"bottleneck": 6}, "prefix": {"length": 3}}


def spec_of(family: str, method: str, **base: Any) -> dict[str, Any]:
    """Return a spec with one adaptation, which targets fused rows and experts if the family has them."""
    own: dict[str, Any] = {"method": method, **{**FOLDING, **STAYING}[method]}
    if method in FOLDING and (method != "ia3" or family == "mixtral"):
        inner = [] if family == "mixtral" and method in ("ia3", "spiel") else ["experts"]
        own["target"] = {"role": ["attn.q", "attn.v", *(inner if family == "mixtral" else ["ffn.down"])]}
    return {"adapt": [own], **({"base": base} if base else {})}


def in_4_bits(model: nn.Module, names: set[str]) -> nn.Module:
    """Return the model with bitsandbytes modules instead of some linear maps."""
    import bitsandbytes

    copied: Any = copy.deepcopy(model)
    for name in names:
        old = copied.get_submodule(name)
        own = {"compress_statistics": False, "quant_type": "nf4"}
        new = bitsandbytes.nn.Linear4bit(old.in_features, old.out_features, old.bias is not None, torch.float32, **own)
        new.weight = bitsandbytes.nn.Params4bit(old.weight.data.clone(), requires_grad=False, **own)
        if old.bias is not None:
            new.bias = nn.Parameter(old.bias.data.clone(), requires_grad=False)
        parent, _, last = name.rpartition(".")
        setattr(copied.get_submodule(parent), last, new.to("cpu"))
    copied.is_loaded_in_4bit = True
    return copied


@cache
def on_packed(family: str, method: str, kind: str, **base: Any) -> Any:
    """Return a model compiled on a quantised base, with random values in the trained tensors."""
    return adapted(family, **spec_of(family, method, quantize=kind, **base))


def dense_source(compiled: Any) -> nn.Module:
    """Return a plain model with the values of a quantised base."""
    model: nn.Module = sharing_copy(compiled.compilation.source)
    for module in model.modules():
        hold_values(module)
    return model


def on_dense(compiled: Any, family: str, method: str) -> Any:
    """Return the same adapters compiled on the plain model of `dense_source`."""
    other = graftc.compile(spec_of(family, method), dense_source(compiled)).eval()
    other.load_adapter_state_dict(compiled.adapter_state_dict())
    return other


def full_precision(family: str, method: str, kind: str) -> None:
    """Check that a merge to full precision equals, bit for bit, a merge into a plain base of the same values.

    The outputs of the merged model must be those of the compiled model.
    """
    compiled = on_packed(family, method, kind)
    merged = compiled.merge(base="full")
    expected = on_dense(compiled, family, method).merge().folded_state_dict()
    tensors = merged.folded_state_dict()
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name], expected[name]) for name in expected)
    inputs = inputs_for(compiled)
    unfolded = outputs_of(compiled, inputs)
    bound = 1e-5 * max(1.0, float(unfolded[0].abs().max()))
    assert largest_difference(outputs_of(merged, inputs), unfolded) < bound


def in_onnx_runtime(family: str, method: str, kind: str, folder: Path) -> None:
    """Check that the exported file gives the compiled model's outputs within 2e-5.

    Neither the file nor the one that ONNX Runtime optimises may contain a packed weight in full precision.
    """
    compiled = on_packed(family, method, kind)
    path = compiled.export(folder / "model.onnx", "onnx")
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(folder / "optimised.onnx")
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    inputs = inputs_for(compiled, (2, 7), 3, front=False)
    outputs = session.run(None, {name: value.numpy() for name, value in inputs.items()})
    expected = outputs_of(compiled, inputs)
    for theirs, own in zip(outputs, expected, strict=True):
        bound = 2e-5 * max(1.0, float(own.abs().max()))
        assert float((torch.from_numpy(theirs) - own).abs().max()) < bound
    store = compiled.compilation.store
    plain = {tuple(tensor.shape) for name, tensor in store.weights() if name not in store.packed}
    packed = {tuple(own.shape) for own in store.packed.values()}
    packed, plain = (shapes | {shape[:-2] + shape[:-3:-1] for shape in shapes} for shapes in (packed, plain))
    for name in ("model.onnx", "optimised.onnx"):
        tensors = onnx.load(folder / name).graph.initializer
        assert not {tuple(t.dims) for t in tensors if t.data_type == onnx.TensorProto.FLOAT} & (packed - plain)
