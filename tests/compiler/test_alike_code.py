"""Layers are traced one by one if their code may tell them apart by something that no layer stores."""

from __future__ import annotations

import math
import weakref
from collections import Counter
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from graftc.compiler.capture.alike.code import LooksElsewhere
from graftc.specs.errors.diagnostics import GraftError
from tests.compiler.test_alike import DEPTH, Layer, Stack
from tests.kit.models import fresh

AT: ContextVar[int] = ContextVar("AT", default=0)
SEEN: Counter[str] = Counter()
TIMES = 0
SCALE = 2.0
SPECIAL: dict[int, bool] = {}
HALF = (0.5, "half")


def plain(x: Tensor) -> Tensor:
    return torch.relu(x) * SCALE * HALF[0] * math.pi


def counted(x: Tensor) -> Tensor:
    SEEN["calls"] += 1
    return x


class ByVars(Layer):
    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        return super().forward(x.detach() if vars(self)["place"] == 3 else x, scale)


class ByDict(Layer):
    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        return super().forward(x.detach() if self.__dict__["place"] == 3 else x, scale)


class BySlot(Layer):
    __slots__ = ("kept",)

    def __init__(self, place: int) -> None:
        super().__init__()
        self.kept = place

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        return super().forward(x.detach() if self.kept == 3 else x, scale)


class ById(Layer):
    def __init__(self, place: int) -> None:
        super().__init__()
        SPECIAL[id(self)] = place == 3

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        return super().forward(x.detach() if SPECIAL[id(self)] else x, scale)


class ByCount(Layer):
    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        global TIMES
        TIMES += 1
        return super().forward(x.clamp(max=9.0) if TIMES % DEPTH == 3 else x, scale)


class ByContext(Layer):
    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        return super().forward(x.detach() if AT.get() == 3 else x, scale)


class ByHelper(Layer):
    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        return super().forward(counted(x), scale)


def by_closure(place: int) -> nn.Module:
    calls: list[None] = []

    class Closed(Layer):
        def forward(self, x: Tensor, scale: Tensor) -> Tensor:
            calls.append(None)
            return super().forward(x, scale)

    return Closed(place)


class Plain(Layer):
    """A layer with constant globals, helpers and a property, none of which tells layers apart."""

    @property
    def ratio(self) -> float:
        return SCALE / 2

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        return super().forward(plain(x) * self.ratio, scale)


@pytest.mark.parametrize("kind", [ByVars, ByDict, BySlot, ById, ByCount, ByContext, ByHelper, by_closure])
def test_what_looks_elsewhere(kind: Callable[[int], nn.Module]) -> None:
    assert LooksElsewhere().of(kind(0))


@pytest.mark.parametrize("module", [Layer(), Plain(), nn.Linear(8, 2), nn.TransformerEncoderLayer(8, 2)], ids=repr)
def test_what_does_not(module: nn.Module) -> None:
    assert not LooksElsewhere().of(module)


@pytest.mark.slow
@pytest.mark.parametrize("hold", [lambda model: [model], weakref.ref], ids=["list", "weak reference"])
def test_layers_that_know_their_model(hold: Callable[[nn.Module], Any]) -> None:
    class Knowing(Layer):
        def forward(self, x: Tensor, scale: Tensor) -> Tensor:
            reference: Any = self.held
            model = reference() if callable(reference) else reference[0]
            return super().forward(x.detach() if model.layers[3] is self else x, scale)

    model = Stack(Knowing)
    for layer in model.layers:
        vars(layer)["held"] = hold(model)
    require_a_stop_at_the_fourth(model)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [ByVars, BySlot, ById])
def test_gradients_that_one_layer_stops(kind: Callable[[int], nn.Module]) -> None:
    require_a_stop_at_the_fourth(Stack(kind))


def require_a_stop_at_the_fourth(model: nn.Module) -> None:
    """Check that layers before the fourth get no gradient, so cannot be adapted, and that layers after it can be."""
    x = torch.randn(3, 8)
    with pytest.raises(GraftError) as error:
        fresh(model, {"method": "lora", "target": {"modules": ["layers.*.inner"]}}, inputs={"x": x}, cache=False)
    assert error.value.code == "GC023" and "layers.0." in error.value.message
    compiled = fresh(
        model,
        {"method": "lora", "target": {"modules": ["layers.4.inner", "layers.5.inner"]}},
        inputs={"x": x},
        cache=False,
    )
    torch.testing.assert_close(compiled(x), model(x), rtol=0, atol=0)
