"""Stacks of layers that are alike, whose outer code does more than call one after the other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graftc
from graftc.specs.errors.diagnostics import GraftError
from tests.compiler.test_called_layers import is_called
from tests.kit.comparing import gradients_of

WIDTH = 8
LORA = {"method": "lora", "rank": 2, "target": {"modules": "layers.*.up"}}


class Layer(nn.Module):
    """A residual layer with a norm that others may call."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 12), nn.Linear(12, WIDTH)
        nn.init.normal_(self.norm.weight)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Stack(nn.Module):
    """Layers in a row, and an outer forward that uses them."""

    def __init__(self, run: Callable[[Any, Tensor], Tensor], depth: int = 7) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers, self.run = nn.ModuleList(Layer() for _ in range(depth)), run
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def through(layers: Any, x: Tensor) -> Tensor:
    for layer in layers:
        x = layer(x)
    return x


X = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(1))


@pytest.mark.sample("a norm before-eval", "a norm before-train", "one twice in a row-train")
@pytest.mark.slow
@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(
    "run",
    [
        lambda model, x: model.layers[3].norm(through(model.layers, x)),
        lambda model, x: through(model.layers, model.layers[4].norm(x)),
        lambda model, x: through(model.layers, x) + model.layers[3].down(torch.relu(model.layers[4].up(x))),
        lambda model, x: model.layers[3](through(model.layers, x)),
        lambda model, x: through(model.layers[3:], through(model.layers[:4], x)),
    ],
    ids=["a norm behind", "a norm before", "two maps of other layers", "a whole layer again", "one twice in a row"],
)
def test_parts_of_layers_that_are_called_again(run: Callable[[Any, Tensor], Tensor], mode: bool) -> None:
    model = Stack(run).train(mode)
    compiled = graftc.compile({"adapt": [LORA]}, model, {"x": X}, cache=False).train(mode)
    torch.testing.assert_close(compiled(X), model(X), rtol=0, atol=1e-6)
    compiled(X).sum().backward()
    grads = gradients_of(compiled)
    assert {name.split(".")[1] for name in grads} == {str(number) for number in range(7)}


@pytest.mark.slow
@pytest.mark.parametrize("depth", [4, 7, 9])
@pytest.mark.parametrize("at", [2, -2])
def test_a_gradient_that_is_stopped_between_layers_is_refused_at_any_depth(depth: int, at: int) -> None:
    """Layers before the stop cannot learn, whether they are written out or call a function."""

    def stopped(model: Any, x: Tensor) -> Tensor:
        return through(model.layers[at:], through(model.layers[:at], x).detach())

    with pytest.raises(GraftError) as error:
        graftc.compile({"adapt": [LORA]}, Stack(stopped, depth), {"x": X}, cache=False)
    assert error.value.code == "GC023" and "layers.0.up" in error.value.message


@pytest.mark.slow
def test_a_gradient_that_is_stopped_before_all_layers_is_none_of_theirs() -> None:
    compiled = graftc.compile(
        {"adapt": [LORA]}, Stack(lambda model, x: through(model.layers, x.detach())), {"x": X}, cache=False
    )
    assert is_called(compiled)
