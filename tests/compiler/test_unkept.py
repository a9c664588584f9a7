"""Warnings about what a graph lacks of its model: custom backward passes, queries to torch, later changes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graftc
from graftc.specs.errors.diagnostics import GraftError, GraftWarning

SPEC = {"adapt": [{"method": "lora", "rank": 2, "target": {"modules": ["inner"]}}]}
X = torch.randn(4, 6)


class Reversed(torch.autograd.Function):
    """The identity, whose gradient is negated."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return -gradient


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.act, self.scale = nn.Linear(6, 8), nn.Tanh(), 2.0

    def forward(self, x: Tensor) -> Tensor:
        return self.more(self.act(self.inner(x))) * self.scale

    def more(self, y: Tensor) -> Tensor:
        return y


class WithFunction(Plain):
    def more(self, y: Tensor) -> Tensor:
        result: Tensor = Reversed.apply(y)
        return result


def reverse(y: Tensor) -> Tensor:
    result: Tensor = Reversed.apply(y)
    return result


class WithHelper(Plain):
    def more(self, y: Tensor) -> Tensor:
        return reverse(y)


class WithHook(Plain):
    def more(self, y: Tensor) -> Tensor:
        if y.requires_grad:
            y.register_hook(lambda gradient: 5 * gradient)
        return y


class AsksForGradients(Plain):
    def more(self, y: Tensor) -> Tensor:
        return y if torch.is_grad_enabled() else y * 2


class AsksForInference(Plain):
    def more(self, y: Tensor) -> Tensor:
        return y * 2 if torch.is_inference_mode_enabled() else y


class AsksForAutocast(Plain):
    def more(self, y: Tensor) -> Tensor:
        return y * 2 if torch.is_autocast_enabled("cpu") else y


class AsksForMemory(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if x.is_contiguous() else x * 2)


TOLD: dict[type[Plain], str] = {
    WithFunction: "WithFunction.more has a custom backward pass, Reversed",
    WithHelper: "reverse has a custom backward pass, Reversed",
    WithHook: "WithHook.more registers hooks on gradients",
    AsksForGradients: "AsksForGradients.more checks whether gradients are enabled",
    AsksForInference: "AsksForInference.more checks whether inference mode is on",
    AsksForAutocast: "AsksForAutocast.more checks whether autocast is on",
    AsksForMemory: "AsksForMemory.forward checks the memory layout of an input",
}


@pytest.mark.parametrize("cls", TOLD, ids=lambda cls: cls.__name__)
@pytest.mark.parametrize("within", [False, True], ids=["itself", "inside"])
def test_what_forward_has_beyond_operators(cls: type[Plain], within: bool) -> None:
    model = nn.Sequential(cls(), nn.Linear(8, 3)) if within else cls()
    spec = {"adapt": [{"method": "lora", "rank": 2, "target": {"modules": ["0.inner" if within else "inner"]}}]}
    with pytest.warns(GraftWarning, match="GC049") as caught:
        report = graftc.check(spec, model, (X,), cache=False)
    messages = [str(w.message) for w in caught if "GC049" in str(w.message)]
    assert any(TOLD[cls] in message for message in messages)
    assert any(TOLD[cls] in note for note in report.notes)


@pytest.mark.parametrize("register", ["register_full_backward_hook", "register_full_backward_pre_hook"])
def test_hooks_on_the_backward_pass(register: str) -> None:
    model = Plain()
    getattr(model.act, register)(lambda *_: None)
    with pytest.warns(GraftWarning, match="GC049: a hook on the backward pass of act"):
        graftc.check(SPEC, model, (X,), cache=False)


def test_nothing_is_said_of_plain_models(recwarn: pytest.WarningsRecorder) -> None:
    graftc.check(SPEC, Plain(), (X,), cache=False)
    assert not list(recwarn)


CHANGES: dict[str, tuple[Callable[[Any], object], str]] = {
    "attribute": (lambda m: setattr(m, "scale", 3.0), "scale"),
    "module": (lambda m: setattr(m, "act", nn.ReLU()), "act"),
    "another attribute": (lambda m: setattr(m, "fresh", 1), "fresh"),
    "buffer": (lambda m: m.register_buffer("kept", torch.ones(2)), "set of tensors"),
    "hook": (lambda m: m.act.register_forward_hook(lambda *_: None), ""),
    "method": (lambda m: setattr(m, "more", lambda y: y * 2), ""),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_source_that_changed_is_told_when_a_graph_is_made(change: str) -> None:
    """Calls that have a graph still run as before, without a warning."""
    model = Plain()
    compiled = graftc.compile(SPEC, model, (X,)).eval()
    before = compiled(X)
    act, name = CHANGES[change]
    act(model)
    assert torch.equal(compiled(X), before)
    with pytest.warns(GraftWarning, match="GC048: Plain has changed since it was compiled") as caught:
        compiled(X.reshape(2, 2, 6))
    told = [w for w in caught if "GC048" in str(w.message)]
    assert len(told) == 1 and (not name or f"({name})" in str(told[0].message) or "the module" in str(told[0].message))


def test_modes_and_freezing_are_no_changes(recwarn: pytest.WarningsRecorder) -> None:
    model = Plain()
    compiled = graftc.compile(SPEC, model, (X,)).eval()
    model.eval().requires_grad_(False)
    model(X)
    compiled(X.reshape(2, 2, 6))
    assert not [w for w in recwarn if "GC048" in str(w.message)]


class Overlapping(nn.Module):
    """Two buffers in the same memory, one of which is written to."""

    def __init__(self, *, apart: bool) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 8)
        memory = torch.ones(12)
        self.register_buffer("all", memory[:8])
        self.register_buffer("some", memory[8:] if apart else memory[4:8])

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.all.add_(1)
        y: Tensor = self.inner(x) + self.some.sum()
        return y


@pytest.mark.slow
def test_buffers_that_overlap() -> None:
    """Only one of two copies would be written to; buffers that lie side by side in the same memory are separate."""
    with pytest.raises(GraftError, match="writes to all, which shares memory with some") as caught:
        graftc.compile(SPEC, Overlapping(apart=False), (X,))
    assert caught.value.code == "GC030"
    graftc.compile(SPEC, Overlapping(apart=True), (X,))
