"""Wrapping a compiled model with peft is refused with a replacement to write, and leaves the model unchanged."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import graftc
from graftc.specs.errors.diagnostics import GraftError
from graftc.testing.compare import inputs_for, outputs_of
from graftc.testing.families import tiny

peft = pytest.importorskip("peft")

TARGETS = ["q_proj", "q", "query", "c_attn"]
WAYS: dict[str, Callable[[Any, Path], Any]] = {
    "get": lambda model, folder: peft.get_peft_model(model, peft.LoraConfig(target_modules=TARGETS)),
    "task": lambda m, folder: peft.get_peft_model(m, peft.LoraConfig(target_modules=TARGETS, task_type="CAUSAL_LM")),
    "mixed": lambda m, folder: peft.get_peft_model(m, peft.LoraConfig(target_modules=TARGETS), mixed=True),
    "ia3": lambda m, folder: peft.get_peft_model(m, peft.IA3Config(target_modules=TARGETS, feedforward_modules=[])),
    "prompt": lambda model, folder: peft.get_peft_model(
        model, peft.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    ),
    "inject": lambda model, folder: peft.inject_adapter_in_model(peft.LoraConfig(target_modules=TARGETS), model),
    "load": lambda model, folder: peft.PeftModel.from_pretrained(model, folder),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("adapter")
    peft.get_peft_model(tiny("llama"), peft.LoraConfig(target_modules=["q_proj"])).save_pretrained(path)
    return path


@pytest.fixture(scope="module", params=["llama", "t5", "gpt2"])
def model(request: pytest.FixtureRequest) -> Any:
    spec = {"adapt": [{"method": "lora", "target": {"role": ["attn.q"]}}]}
    return graftc.compile(spec, tiny(request.param))


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_what_to_write_is_said_and_nothing_changes(way: str, model: Any, folder: Path) -> None:
    inputs = inputs_for(model)
    before = outputs_of(model, inputs), [(n, p.requires_grad) for n, p in model.named_parameters()], set(vars(model))
    with pytest.raises(GraftError) as caught:
        WAYS[way](model, folder)
    assert caught.value.code == "GC072"
    assert all(word in caught.value.hint for word in ("graftc.compile(", "compiled.add(", "graftc.import_peft("))
    assert all(torch.equal(a, b) for a, b in zip(outputs_of(model, inputs), before[0], strict=True))
    assert [(n, p.requires_grad) for n, p in model.named_parameters()] == before[1] and set(vars(model)) == before[2]


def test_other_modules_hold_a_compiled_model_and_peft_other_models(model: Any) -> None:
    container = torch.nn.ModuleDict({"model": model})
    assert container["model"] is model
    assert peft.get_peft_model(copy.deepcopy(tiny("llama")), peft.LoraConfig(target_modules=["q_proj"])) is not None


@pytest.mark.slow
def test_graphs_are_kept_all_the_same() -> None:
    """The global module hook that detects peft's wrapping does not keep captures out of the cache."""
    spec = {"adapt": [{"method": "lora", "target": {"role": ["attn.q"]}}]}
    first, second = (graftc.compile(spec, tiny("bert")) for _ in range(2))
    assert not first.report.notes and second.report.cached
