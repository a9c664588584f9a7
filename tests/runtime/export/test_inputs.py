"""Adaptations as inputs of an exported graph give what constants give, and can be replaced in the same graph."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import graftc
from graftc.runtime.compiled import Compiled
from graftc.runtime.export.job import ExportJob
from graftc.runtime.model.runner import ModelRoot, runner_of
from graftc.specs.errors.diagnostics import GraftError
from graftc.testing import largest_difference, outputs_of, perturb
from graftc.testing.compare import SHAPES, inputs_for
from graftc.testing.families import tiny
from tests.kit.models import adapted

PREFIX: dict[str, Any] = {"method": "prefix", "length": 3}
NETWORK = {**PREFIX, "reparameterization": {"hidden": 8}}
LORA: dict[str, Any] = {"method": "lora", "target": {"role": ["attn.q", "ffn.down"]}, "rank": 4, "dropout": 0.1}
FAMILIES = ["gpt2", "t5", *(pytest.param(family, marks=pytest.mark.full) for family in ("bert", "llama"))]


def beside(path: Path, name: str) -> dict[str, Tensor]:
    """Return the tensors in the companion file of an export."""
    from safetensors.torch import load_file

    return load_file(path.with_name(f"{path.name}.{name}.safetensors"))


Run = Callable[[Mapping[str, Tensor], Mapping[str, Tensor]], list[Tensor]]
"""Outputs of an exported file for a model's inputs and tensors of adaptations."""


def in_torch(path: Path) -> Run:
    """Return a function that runs a ``.pt2`` file."""
    program = torch.export.load(path).module()

    def run(inputs: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> list[Tensor]:
        own: dict[str, Any] = {"adapter_tensors": dict(tensors)} if tensors else {}
        with torch.no_grad():
            return list(program(**inputs, **own).values())

    return run


def in_onnx(path: Path) -> Run:
    """Return a function that runs an ``.onnx`` file, whose inputs must be exactly those that it is given."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [value.name for value in (*session.get_inputs(), *session.get_overridable_initializers())]

    def run(inputs: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> list[Tensor]:
        assert sorted(names) == sorted([*inputs, *tensors])
        outputs = session.run(None, {name: value.numpy() for name, value in {**inputs, **tensors}.items()})
        return [torch.from_numpy(value) for value in outputs]

    return run


OPEN = {"pt2": (in_torch, 1e-5), "onnx": (in_onnx, 1e-4)}


def check(format: str, compiled: Compiled, other: ModelRoot, name: str, folder: Path) -> None:
    """Check that both forms agree, and that the tensors of ``other``, in its deployed form, give its outputs."""
    opened, tolerance = OPEN[format]
    constants = compiled.export(folder / f"constants.{format}", format)
    path = compiled.export(folder / f"inputs.{format}", format, inputs=[name])
    files = {constants.name, path.name, f"{path.name}.{name}.safetensors"}
    assert {file.name for file in folder.iterdir()} == files
    run, plain = opened(path), opened(constants)
    tensors = beside(path, name)
    swapped = ExportJob(runner_of(other).complete(), {"inputs": [name]}).graph().values
    assert list(tensors) and set(swapped) == set(tensors)
    for sizes in SHAPES:
        inputs = inputs_for(compiled, sizes, front=False)
        expected = outputs_of(compiled, inputs)
        outputs = run(inputs, tensors)
        assert largest_difference(outputs, plain(inputs, {})) <= tolerance
        assert largest_difference(outputs, expected) <= tolerance
        changed = run(inputs, swapped)
        assert largest_difference(changed, outputs_of(other, inputs)) <= tolerance
        assert largest_difference(changed, expected) > 1e-3


@pytest.mark.full
@pytest.mark.parametrize("format", list(OPEN))
@pytest.mark.parametrize("family", FAMILIES)
def test_a_prefix(family: str, format: str, tmp_path: Path) -> None:
    """The inputs are the keys and values of every attention, whatever network computed them."""
    other = adapted(family, PREFIX, noise=0.2, noise_seed=1)
    check(format, adapted(family, NETWORK, noise=0.2), other, "prefix", tmp_path)


@pytest.mark.full
@pytest.mark.parametrize("format", list(OPEN))
@pytest.mark.parametrize("method", ["lora", pytest.param("pfeiffer", marks=pytest.mark.full)])
def test_what_else_stays_in_the_graph(method: str, format: str, tmp_path: Path) -> None:
    """Methods other than prefixes can be inputs as well."""
    adapt = {"lora": LORA, "pfeiffer": {"method": "pfeiffer", "bottleneck": 5}}[method]
    check(format, adapted("bert", adapt, noise=0.2), adapted("bert", adapt, noise=0.2, noise_seed=1), method, tmp_path)


@pytest.mark.full
def test_the_files(tmp_path: Path) -> None:
    """The tensors of one adaptation are inputs under their full names, and none of them is in the graph.

    The other adaptation has folded, and the file contains the certificate of that. A second adaptation has a file of
    its own.
    """
    import onnx

    compiled = adapted("gpt2", {**LORA, "name": "low"}, PREFIX, noise=0.2)
    partial = compiled.merge_partially()
    path = partial.export(tmp_path / "model.onnx", inputs=["prefix"])
    tensors = beside(path, "prefix")
    assert set(tensors) == {
        f"transformer.h.{i}.attn.graftc.prefix.attn.{p}" for i in (0, 1) for p in ("keys", "values")
    }
    model = onnx.load(path)
    assert [value.name for value in model.graph.input] == ["input_ids", "attention_mask", *sorted(tensors)]
    shapes = {v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in model.graph.input[2:]}
    assert {tuple(shape[1:]) for shape in shapes.values()} == {(48,)}
    assert {shape[0] for shape in shapes.values()} == {"prefix"}
    defaults = {value.name: list(value.dims) for value in model.graph.initializer if "graftc" in value.name}
    assert defaults == {name: [0, 48] for name in tensors}
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    assert json.loads(metadata["graftc.inputs"]) == ["prefix"]
    assert json.loads(metadata["graftc.certificate"]) == json.loads(json.dumps(partial.certificate.to_json()))
    inputs = inputs_for(compiled, front=False)
    assert largest_difference(in_onnx(path)(inputs, tensors), outputs_of(compiled, inputs)) <= 1e-4

    both = compiled.export(tmp_path / "both" / "model.onnx", inputs=["prefix", "low", "prefix"])
    assert {file.name for file in both.parent.iterdir()} == {
        "model.onnx",
        *(f"model.onnx.{name}.safetensors" for name in ("prefix", "low")),
    }
    every = {**beside(both, "prefix"), **beside(both, "low")}
    assert largest_difference(in_onnx(both)(inputs, every), outputs_of(compiled, inputs)) <= 1e-4


@pytest.mark.full
def test_a_program_holds_no_values_of_inputs(tmp_path: Path) -> None:
    """A ``.pt2`` file contains no tensor of the adaptation and states which are inputs."""
    path = adapted("gpt2", NETWORK, noise=0.2).export(tmp_path / "model.pt2", "pt2", inputs=["prefix"])
    extra = {"graftc.inputs": ""}
    program = torch.export.load(path, extra_files=extra)
    assert json.loads(extra["graftc.inputs"]) == ["prefix"]
    assert not [name for name in program.state_dict if "graftc" in name]


@pytest.mark.full
def test_a_bank_by_row(tmp_path: Path) -> None:
    """Slots of a bank can be inputs, in addition to the input that selects a slot for each row."""
    adapt = [{**PREFIX, "name": "first"}, {**PREFIX, "name": "second"}]
    compiled = graftc.compile({"adapt": adapt, "compose": {"bank": ["first", "second"]}}, tiny("llama")).eval()
    perturb(compiled, 0.2)
    inputs = inputs_for(compiled, (3, 6), front=False)
    inputs["adapter_ids"] = torch.tensor([1, 0, 1])
    path = compiled.export(tmp_path / "bank.onnx", example_inputs=inputs, inputs=["first", "second"])
    tensors = {**beside(path, "first"), **beside(path, "second")}
    inputs["adapter_ids"] = torch.tensor([0, 1, 1])
    assert largest_difference(in_onnx(path)(inputs, tensors), outputs_of(compiled, inputs)) <= 1e-4
    second = {name.replace("first", "second"): t for name, t in tensors.items() if "first" in name}
    first = {name.replace("second", "first"): t for name, t in tensors.items() if "second" in name}
    swapped = {**inputs, "adapter_ids": 1 - inputs["adapter_ids"]}
    assert largest_difference(in_onnx(path)(swapped, {**first, **second}), outputs_of(compiled, inputs)) <= 1e-4
    assert largest_difference(in_onnx(path)(inputs, {**first, **second}), outputs_of(compiled, inputs)) > 1e-3


@pytest.mark.slow
def test_what_cannot_be_an_input(tmp_path: Path) -> None:
    """Unknown names and adaptations that have left the graph are refused."""
    compiled = adapted("bert", {**LORA, "name": "low"}, noise=0.2)
    cases: list[tuple[ModelRoot, str, str, str]] = [
        (compiled, "lwo", "GC091", "did you mean 'low'?"),
        (compiled, "elsewhere", "GC091", "available: low"),
        (compiled.merge(), "low", "GC065", "folded into the weights"),
    ]
    for runner, name, code, hint in cases:
        with pytest.raises(GraftError) as caught:
            runner.export(tmp_path / "model.onnx", inputs=[name])
        assert caught.value.code == code
        assert hint in (caught.value.hint or "")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_companion_is_kept(tmp_path: Path) -> None:
    """An existing file in the place of a tensor file is not replaced."""
    (tmp_path / "model.pt2.low.safetensors").write_text("mine")
    with pytest.raises(GraftError) as caught:
        adapted("bert", {**LORA, "name": "low"}, noise=0.2).export(tmp_path / "model.pt2", "pt2", inputs=["low"])
    assert caught.value.code == "GC063"
    assert (tmp_path / "model.pt2.low.safetensors").read_text() == "mine"
