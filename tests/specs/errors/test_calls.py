"""Calls that do not fit a function's signature raise errors that say what is missing."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import graftc
from graftc.specs.errors.calls import public
from tests.kit.refusals import refused

MODEL = nn.Sequential(nn.Linear(3, 3))
SPEC = {"adapt": [{"method": "lora", "rank": 2, "target": {"modules": "0"}}]}
NAMES = [name for name in graftc.__all__ if inspect.isfunction(getattr(graftc, name))]


def required(function: Callable[..., Any]) -> list[str]:
    parameters = inspect.signature(function).parameters.values()
    return [p.name for p in parameters if p.default is p.empty and p.kind is not p.VAR_KEYWORD]


@pytest.mark.parametrize("name", [name for name in NAMES if required(getattr(graftc, name))])
def test_every_public_function_says_what_it_needs(name: str) -> None:
    function = getattr(graftc, name)
    words = required(function)
    error = refused(function, code="GC073")
    assert error.message.startswith(f"graftc.{name} needs ") and all(word in error.message for word in words)
    parameters = inspect.signature(function).parameters
    shown = [f"{word}=..." if parameters[word].kind is inspect.Parameter.KEYWORD_ONLY else word for word in words]
    assert error.hint == f"call graftc.{name}({', '.join(shown)})"
    if len(words) > 1:
        error = refused(function, None, code="GC073")
        assert words[0] not in error.message and words[-1] in error.message


def test_a_config_alone() -> None:
    error = refused(graftc.compile, SPEC, code="GC073")
    assert error.message == "graftc.compile needs model" and error.hint == "call graftc.compile(spec, model)"


CALLS: dict[str, tuple[Callable[[], Any], str, str]] = {
    "misspelt": (
        lambda: graftc.compile(SPEC, MODEL, exmaple_inputs=None),  # type: ignore[call-overload]
        "graftc.compile has no argument 'exmaple_inputs'",
        "did you mean 'example_inputs'?",
    ),
    "too many": (
        lambda: graftc.compile(SPEC, MODEL, None, 3),  # type: ignore[call-overload]
        "graftc.compile takes 3 positional arguments, but 4 were passed",
        "pass seed, cache, progress by name",
    ),
    "twice": (
        lambda: graftc.load("folder", path="other"),  # type: ignore[call-overload]
        "graftc.load got 'path' twice, by position and by name",
        "call graftc.load(path)",
    ),
    "a stranger": (
        lambda: graftc.roles(MODEL, zzz=1),  # type: ignore[call-arg]
        "graftc.roles has no argument 'zzz'",
        "its arguments are model, example_inputs, cache",
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_arguments_that_do_not_fit(name: str) -> None:
    call, message, hint = CALLS[name]
    error = refused(call, code="GC073")
    assert error.message == message and error.hint == hint


def test_a_fault_inside_of_a_function_stays_its_own() -> None:
    @public("graftc.example")
    def example(number: int, *, name: str = "") -> int:
        """Says it."""
        return len(name, number)  # type: ignore[call-arg]

    with pytest.raises(TypeError, match="len"):
        example(1)
    assert example.__doc__ == "Says it." and list(inspect.signature(example).parameters) == ["number", "name"]
    assert refused(example, code="GC073").message == "graftc.example needs number"


class Trainer:
    def __init__(self, model: nn.Module, args: Any = None) -> None:
        self.model = model


@pytest.fixture(scope="module")
def adapted_model() -> Any:
    return graftc.compile(SPEC, MODEL, (torch.ones(4, 3),))


TRAINERS: dict[str, tuple[Callable[[Any], Any], str, str]] = {
    "no class": (lambda own: own.trainer(args=None), "compiled.trainer needs kind", "call compiled.trainer(kind)"),
    "a model alone": (lambda own: own.trainer(model=own), "compiled.trainer needs kind", "call compiled.trainer(kind)"),
    "a model too": (
        lambda own: own.trainer(Trainer, model=own),
        "a trainer for a compiled model always trains that model",
        "leave model out: compiled.trainer(Trainer, args=...)",
    ),
    "a name": (
        lambda own: own.trainer("DPOTrainer"),
        "kind is of type str",
        "pass the class: compiled.trainer(DPOTrainer, args=...)",
    ),
    "by position": (
        lambda own: own.trainer(Trainer, None),
        "compiled.trainer takes 1 positional argument, but 2 were passed",
        "pass args by name",
    ),
}


@pytest.mark.parametrize("name", TRAINERS)
def test_trainers(name: str, adapted_model: Any) -> None:
    call, message, hint = TRAINERS[name]
    error = refused(call, adapted_model, code="GC073")
    assert error.message == message and error.hint == hint


def test_a_trainer_that_has_no_reference(adapted_model: Any) -> None:
    assert isinstance(adapted_model.trainer(Trainer), Trainer)
