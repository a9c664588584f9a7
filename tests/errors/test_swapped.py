"""What stands in the place of a spec or a model is named."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import graftc
from graftc.specs.errors.diagnostics import GraftError
from tests.families import tiny
from tests.interop.trl_runs import tokenizer

MODEL = nn.Linear(3, 3)
SPEC = {"adapt": [{"method": "lora", "target": {"modules": "**"}}]}
WRONG: dict[str, Callable[[], Any]] = {
    "a tokenizer": tokenizer,
    "example inputs": lambda: {"input_ids": torch.ones(1, 2, dtype=torch.long)},
    "example inputs, in order": lambda: (torch.ones(1, 2),),
    "example inputs, alone": lambda: torch.ones(1, 2),
    "a config of transformers": lambda: tiny("bert").config,
}
SPECS: dict[str, Callable[[], Any]] = {
    "a spec": lambda: SPEC,
    "a spec, read": lambda: graftc.Spec.model_validate(SPEC),
    "a config of PEFT": lambda: pytest.importorskip("peft").LoraConfig(target_modules=["q"]),
    "a config of PEFT, as data": lambda: {"peft_type": "LORA", "target_modules": ["q"]},
}
FUNCTIONS: dict[str, Callable[[Any, Any], Any]] = {
    "compile": graftc.compile,
    "check": graftc.check,
    "tune": lambda spec, model: graftc.tune(spec, model, print),
}


def refused(function: str, spec: Any, model: Any) -> str:
    with pytest.raises(GraftError) as caught:
        FUNCTIONS[function](spec, model)
    assert caught.value.code == "GC073" and f"graftc.{function}(spec, model)" in caught.value.hint
    return caught.value.message


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("name", SPECS)
def test_swapped(name: str, function: str) -> None:
    what = name.partition(",")[0]
    message = refused(function, MODEL, SPECS[name]())
    assert message == f"a model stands where the spec goes: a Linear, and {what} where the model goes"


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("name", WRONG)
def test_another_thing_in_the_place_of_the_spec(name: str, function: str) -> None:
    what = name.partition(",")[0]
    assert refused(function, WRONG[name](), MODEL).startswith(f"{what} stands where the spec goes")


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("name", [*WRONG, *SPECS])
def test_another_thing_in_the_place_of_the_model(name: str, function: str) -> None:
    what = name.partition(",")[0]
    assert refused(function, SPEC, {**WRONG, **SPECS}[name]()).startswith(f"{what} stands where the model goes")


@pytest.mark.parametrize("function", FUNCTIONS)
def test_two_models(function: str) -> None:
    assert refused(function, MODEL, MODEL) == "a model stands where the spec goes: a Linear"
