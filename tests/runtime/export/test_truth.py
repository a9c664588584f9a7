"""An exported file describes its adaptations as ONNX Runtime finds them, with and without each of them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import graftc
from graftc.testing import tiny
from tests.kit.models import adapted

IDS = torch.randint(3, 90, (2, 6), generator=torch.Generator().manual_seed(0))
ADAPT: dict[str, dict[str, Any]] = {
    "low": {"method": "lora", "rank": 2, "target": {"role": "attn.q"}},
    "high": {"method": "lora", "rank": 2, "target": {"role": ["attn.v", "ffn.down"]}},
    "front": {"method": "prefix", "length": 3},
}


def named(*names: str) -> Any:
    """Return a tiny Llama with the adaptations of these names."""
    return adapted("llama", *({"name": name, **ADAPT[name]} for name in names), noise=0.2)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        values: Tensor = model(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits
        return values


Exported = tuple[Path, dict[str, str], Any]
"""A file, what it has to say, and the model that it is of."""


def _exported(kind: str, folder: Path) -> Exported:
    compiled = named("low", "high", "front")
    path = folder / "made.onnx"
    if kind == "compiled":
        compiled.disable("high")
        return compiled.export(path), dict.fromkeys(ADAPT, "constant"), compiled
    if kind == "inputs":
        expected = {"low": "input", "high": "constant", "front": "input"}
        return compiled.export(path, inputs=["front", "low"]), expected, compiled
    if kind == "partial":
        expected = {"low": "folded", "high": "folded", "front": "constant"}
        return compiled.merge_partially().export(path), expected, compiled
    if kind == "partial, inputs":
        expected = {"low": "folded", "high": "constant", "front": "input"}
        return compiled.merge_partially(only=["low"]).export(path, inputs=["front"]), expected, compiled
    if kind == "merged":
        compiled = named("low", "high")
        return compiled.merge().export(path), {"low": "folded", "high": "folded"}, compiled
    assert kind == "merged, one"
    return compiled.merge("low").export(path), {"low": "folded"}, compiled_without(compiled, "high", "front")


def compiled_without(compiled: Any, *names: str) -> Any:
    compiled.disable(*names)
    return compiled


def run(path: Path, tensors: dict[str, Any]) -> Tensor:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    given = {"input_ids": IDS.numpy(), "attention_mask": torch.ones_like(IDS).numpy(), **tensors}
    return torch.from_numpy(session.run(["logits"], given)[0])


def _states(compiled: Any, said: dict[str, str]) -> Iterator[tuple[str, Tensor]]:
    for name in said:
        with compiled.disabled(name):
            yield name, logits(compiled)


KINDS = ["compiled", "inputs", "partial", "partial, inputs", "merged", "merged, one"]


@pytest.mark.full
@pytest.mark.parametrize("kind", KINDS)
def test_which_adaptations(kind: str, tmp_path: Path) -> None:
    """The file gives the model's outputs with all listed adaptations, and not those without one of them.

    Tensors of inputs are exactly the listed ones, and nothing else of them is in the file.
    """
    import onnx
    from safetensors.numpy import load_file

    path, expected, compiled = _exported(kind, tmp_path)
    about = {entry.key: entry.value for entry in onnx.load(path).metadata_props}
    said = json.loads(about["graftc.adaptations"])
    assert said == expected
    inputs = [name for name, place in said.items() if place == "input"]
    assert sorted(json.loads(about.get("graftc.inputs", "[]"))) == sorted(inputs)
    assert ("graftc.certificate" in about) == ("folded" in said.values())
    tensors = {n: t for name in inputs for n, t in load_file(f"{path}.{name}.safetensors").items()}
    initialisers = {value.name: onnx.numpy_helper.to_array(value) for value in onnx.load(path).graph.initializer}
    for name, place in said.items():
        assert place == "constant" or not any(t.any() for n, t in initialisers.items() if f"graftc.{name}." in n)
    outputs = run(path, tensors)
    if compiled.leaving.off:
        compiled = compiled if kind == "merged, one" else named("low", "high", "front")
    assert torch.allclose(outputs, logits(compiled), atol=1e-3)
    for name, without in _states(compiled, said):
        assert float((outputs - without).abs().max()) > 1e-2, name
        if said[name] == "input" and name == "low":
            zeros = {n: t * 0 if f"graftc.{name}." in n else t for n, t in tensors.items()}
            assert torch.allclose(run(path, zeros), without, atol=1e-3)


@pytest.mark.full
def test_graphs_that_generate(tmp_path: Path) -> None:
    import onnx

    compiled = named("low", "front")
    folder = compiled.merge_partially().export(tmp_path / "generate", "onnx-generate")
    about = {entry.key: entry.value for entry in onnx.load(folder / "model.onnx").metadata_props}
    assert json.loads(about["graftc.adaptations"]) == {"low": "folded", "front": "constant"}


def test_pt2(tmp_path: Path) -> None:
    """An archive of torch states the form of every adaptation, too."""
    adapt = [{"name": name, "method": "lora", "rank": 2, "target": {"modules": "*"}} for name in ("low", "high")]
    compiled: Any = graftc.compile({"adapt": adapt}, torch.nn.Linear(6, 5).eval(), torch.zeros(2, 6)).eval()
    compiled.disable("high")
    path = compiled.export(tmp_path / "made.pt2", "pt2", inputs="low")
    extra = {"graftc.adaptations": ""}
    torch.export.load(path, extra_files=extra)
    assert json.loads(extra["graftc.adaptations"]) == {"low": "input", "high": "constant"}


@pytest.mark.slow
def test_card_and_manifest(tmp_path: Path) -> None:
    """Card and artifact have every adaptation, whatever is disabled; the manifest lists the one that does not fold."""
    compiled = named("low", "front")
    compiled.disable("low")
    with compiled.disabled():
        card = compiled.card()
        compiled.save(tmp_path / "artifact")
    kept = json.loads((tmp_path / "artifact" / "manifest.json").read_text())["kept"]
    assert [item["name"] for item in kept] == ["front"]
    loaded: Any = graftc.load(tmp_path / "artifact", tiny("llama").eval()).eval()
    compiled.enable()
    assert torch.allclose(logits(loaded), logits(compiled), atol=1e-6)
    assert all(name in card for name in ("low", "front")) and "did not pass" not in card
