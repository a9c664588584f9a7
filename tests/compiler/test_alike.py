"""Layers that are alike are traced once, and the graph is the one that tracing all of them gives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

import graftc
from graftc.compiler.capture.alike.code import LooksElsewhere
from graftc.compiler.capture.capture import Capture, capture
from graftc.compiler.capture.request import CaptureRequest
from graftc.compiler.capture.signature import Axis
from graftc.testing import families
from tests.compiler.taken_over import taken_over, with_past
from tests.kit.language_models import CACHE

WIDTH, DEPTH = 8, 6


class Layer(nn.Module):
    """A residual layer that stores its position."""

    def __init__(self, place: int = 0, width: int = WIDTH) -> None:
        super().__init__()
        self.place = place
        self.inner = nn.Linear(WIDTH, width)
        self.outer = nn.Linear(width, WIDTH)

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        return x + self.outer(torch.relu(self.inner(x * scale)))


class Stack(nn.Module):
    """Layers in sequence."""

    def __init__(self, make: Callable[[int], nn.Module] = Layer) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.layers = nn.ModuleList(make(i) for i in range(DEPTH))
        self.scale = nn.Parameter(torch.ones(WIDTH))
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for layer in self.layers:
            x = layer(x, self.scale)
        return x


def once(model: nn.Module) -> Capture:
    """Return a capture with layers taken over, checked against one that traces every layer."""
    return taken_over(model, [Axis("x", torch.float32, ("batch", WIDTH))])


@pytest.mark.slow
def test_all_but_the_first_and_the_last_are_taken_over() -> None:
    model = Stack()
    before = [dict(vars(module)) for module in model.modules()]
    assert once(model).alike == DEPTH - 2
    assert [vars(module) for module in model.modules()] == before
    assert "place" not in vars(Layer)


@pytest.mark.full
def test_a_place_that_is_read_makes_layers_differ() -> None:
    class Deeper(Layer):
        def forward(self, x: Tensor, scale: Tensor) -> Tensor:
            return super().forward(x, scale) / (1 + self.place // 3)

    assert once(Stack(Deeper)).alike == 0
    assert once(Stack(lambda place: Deeper(3 * (place % 2)))).alike == DEPTH - 3


@pytest.mark.slow
def test_layers_that_hold_something_else_are_others() -> None:
    def alternating(place: int) -> nn.Module:
        layer = Layer(place, WIDTH if place != 2 else 2 * WIDTH)
        layer.outer.register_buffer("kept", torch.zeros(1), persistent=place != 3)
        return layer

    assert once(Stack(alternating)).alike == DEPTH - 4


@pytest.mark.full
def test_what_follows_from_modes_and_hooks_is_seen() -> None:
    class Half(Layer):
        def forward(self, x: Tensor, scale: Tensor) -> Tensor:
            return super().forward(x, scale) * (1.0 if self.inner.training else 0.5)

    model = Stack(Half)
    third = model.layers[3]
    third.inner.train = lambda mode=True: nn.Module.train(third.inner, False)  # type: ignore[method-assign]
    assert once(model).alike == DEPTH - 2 - 1

    hooked = Stack()
    hooked.layers[2].inner.register_forward_hook(lambda module, args, result: 2 * result)
    assert once(hooked).alike == DEPTH - 3  # a layer with a hook of unknown kind is like no other


@pytest.mark.slow
def test_what_a_layer_gives_to_others_beside_its_result() -> None:
    kept: list[Tensor] = []

    class Leaking(Layer):
        def forward(self, x: Tensor, scale: Tensor) -> Tensor:
            kept.append(self.inner(x))
            return super().forward(x, scale)

    class Summed(Stack):
        def forward(self, x: Tensor) -> Tensor:
            kept.clear()
            x = super().forward(x)
            return x + torch.stack(kept).sum(0)

    assert once(Summed(Leaking)).alike == 0


@pytest.mark.full
def test_what_a_layer_takes_from_others_beside_its_arguments() -> None:
    kept: dict[str, Tensor] = {}

    class Taking(Layer):
        def forward(self, x: Tensor, scale: Tensor) -> Tensor:
            return super().forward(x, scale) + kept["sum"]

    class Giving(Stack):
        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            for layer in self.layers:
                kept["sum"] = x.sum(-1, keepdim=True)
                x = layer(x, self.scale)
            return x

    assert once(Giving(Taking)).alike == 0


@pytest.mark.full
def test_what_a_layer_changes() -> None:
    class Counting(Layer):
        def forward(self, x: Tensor, scale: Tensor) -> Tensor:
            self.calls = getattr(self, "calls", 0) + 1
            return super().forward(x, scale) * self.calls

    class Appending(Layer):
        def forward(self, x: Tensor, scale: Any) -> Tensor:
            scale.append(scale[-1] * 2)
            return super().forward(x, scale[-1])

    class Growing(Stack):
        def forward(self, x: Tensor) -> Tensor:
            x, scales = self.first(x), [self.scale]
            for layer in self.layers:
                x = layer(x, scales)
            return x

    class InPlace(Layer):
        def forward(self, x: Tensor, scale: Tensor) -> Tensor:
            return super().forward(x, scale).add_(x.mul_(0.5))

    class Norms(Layer):
        def __init__(self, place: int) -> None:
            super().__init__(place)
            self.norm = nn.BatchNorm1d(WIDTH)

        def forward(self, x: Tensor, scale: Tensor) -> Tensor:
            return super().forward(self.norm(x), scale)

    assert once(Stack(Counting)).alike == 0
    assert once(Growing(Appending)).alike == 0
    assert once(Stack(InPlace)).alike == DEPTH - 2
    norms = once(Stack(Norms))
    assert norms.alike == DEPTH - 2
    assert len(norms.program.updates) == 3 * DEPTH


@pytest.mark.slow
def test_a_state_outside_of_the_model_shows_in_the_last_layer() -> None:
    calls: list[None] = []

    class Later(Layer):
        def forward(self, x: Tensor, scale: Tensor) -> Tensor:
            calls.append(None)
            return super().forward(x, scale) * len(calls)

    class Fresh(Stack):
        def forward(self, x: Tensor) -> Tensor:
            calls.clear()
            return super().forward(x)

    assert once(Fresh(Later)).alike == 0


@pytest.mark.full
def test_a_graph_that_the_model_disagrees_with_is_captured_layer_by_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Running the model reveals state outside of it that neither the first nor the last layer shows."""
    monkeypatch.setattr(LooksElsewhere, "of", lambda self, module: False)  # as for the class of a library
    special: set[int] = set()

    class Secret(Layer):
        def forward(self, x: Tensor, scale: Tensor) -> Tensor:
            return super().forward(x, scale) * (3.0 if id(self) in special else 1.0)

    model = Stack(Secret)
    special.add(id(model.layers[2]))
    axes = [Axis("x", torch.float32, ("batch", WIDTH))]
    assert capture(CaptureRequest.of(model, axes)).alike == DEPTH - 2
    x = torch.randn(3, WIDTH)
    compiled = graftc.compile({"adapt": [{"method": "lora", "target": {"modules": "**.inner"}}]}, model, {"x": x})
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x), rtol=0, atol=0)


@pytest.mark.full
def test_a_layer_finds_its_part_of_a_cache_by_its_number() -> None:
    model = families.llama(num_hidden_layers=7).requires_grad_(False)
    assert taken_over(model, with_past(model), mode="eval", flags=(("use_cache", True),)).alike == 5


@pytest.mark.full
@pytest.mark.parametrize(
    ("own", "count"),
    [
        (lambda layer, cache: 1 + layer.self_attn.layer_idx // 2, 0),
        (lambda layer, cache: 1 + [0, 0, 0, 1, 0, 0, 0][layer.self_attn.layer_idx], 0),
        (lambda layer, cache: 1 + cache.get_seq_length() - cache.get_seq_length(layer.self_attn.layer_idx), 0),
        (lambda layer, cache: len(list(cache.layers)), 0),
        (lambda layer, cache: cache.get_seq_length(layer.self_attn.layer_idx), 5),
    ],
    ids=["a number", "a number that finds something else", "another part", "all parts", "its own part"],
)
def test_what_a_layer_does_with_a_cache(own: Callable[[Any, Any], Any], count: int) -> None:
    class Own(LlamaDecoderLayer):  # type: ignore[no-untyped-call]
        def forward(self, hidden_states: Tensor, **rest: Any) -> Tensor:
            scale = own(self, rest[CACHE]) if rest.get(CACHE) is not None else 1
            result: Tensor = super().forward(hidden_states, **rest)
            return result * scale

    model = families.llama(num_hidden_layers=7).requires_grad_(False)
    for layer in model.model.layers:
        layer.__class__ = Own
    assert taken_over(model, with_past(model), mode="eval", flags=(("use_cache", True),)).alike == count
