"""Tensors of layers that do not run are hidden from the tracer, and code that reads one anyway is still captured."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from graftc.compiler.capture.alike.repeats import traced_once
from graftc.compiler.capture.capture import capture
from graftc.compiler.capture.request import CaptureRequest
from graftc.compiler.capture.signature import Axis
from graftc.passes.core.ir.printer import format_program
from graftc.testing import families
from tests.compiler.taken_over import taken_over, with_past
from tests.compiler.test_alike import DEPTH, WIDTH, Layer, Stack, once
from tests.kit.language_models import CACHE

CACHED = (("use_cache", True),)


def tensors_of(module: nn.Module) -> list[str]:
    return [name for name, _ in (*module.named_parameters(), *module.named_buffers())]


def test_layers_between_have_no_tensors_while_the_model_is_traced() -> None:
    model = Stack()
    tables = [(each, each._parameters, each._buffers) for each in model.modules()]
    with traced_once(model, {}) as repeats, repeats.hidden.out_of_sight():
        seen = [number for number, layer in enumerate(model.layers) if tensors_of(layer)]
    assert seen == [0, 1, DEPTH - 1]
    assert all(each._parameters is own and each._buffers is buffers for each, own, buffers in tables)
    assert not repeats.hidden.missed


def test_tensors_come_back_where_tracing_fails() -> None:
    model = Stack()
    before = dict(model.named_parameters())
    with pytest.raises(ZeroDivisionError), traced_once(model, {}) as repeats, repeats.hidden.out_of_sight():
        raise ZeroDivisionError
    assert all(before[name] is tensor for name, tensor in model.named_parameters())


@pytest.mark.slow
@pytest.mark.parametrize(
    "look",
    [
        lambda model: model.layers[3].inner.weight.sum(),
        lambda model: len(getattr(model.layers[3].inner, "weight", ())),
        lambda model: sum(tensor.sum() for tensor in model.layers[3].parameters()),
        lambda model: model.layers[2].outer(model.scale[:WIDTH]).sum(),
    ],
    ids=["a tensor", "whether there is one", "all of them", "a module of it"],
)
def test_a_model_that_looks_into_a_layer_from_outside(look: Callable[[Any], Any]) -> None:
    class Looking(Stack):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * look(self)

    request = CaptureRequest.of(Looking(), [Axis("x", torch.float32, ("batch", WIDTH))])
    every, result = capture(request, alike=False), capture(request)
    assert result.alike == DEPTH - 2
    assert format_program(result.program) == format_program(every.program)


def test_a_tensor_that_is_put_into_a_layer_is_not_lost() -> None:
    class Putting(Stack):
        def forward(self, x: Tensor) -> Tensor:
            self.layers[3].inner.bias = self.layers[0].inner.bias
            return super().forward(x)

    model = Putting()
    own = model.layers[3].inner.bias
    capture(CaptureRequest.of(model, [Axis("x", torch.float32, ("batch", WIDTH))]))
    assert model.layers[3].inner.bias is own


@pytest.mark.slow
def test_layers_that_write_in_place_do_so_in_each() -> None:
    class Filling(Layer):
        def forward(self, x: Tensor, scale: Tensor) -> Tensor:
            filled = x.new_zeros(x.shape)
            filled[..., : WIDTH // 2].copy_(super().forward(x, scale)[..., : WIDTH // 2])
            return x + filled

    result = once(Stack(Filling))
    assert result.alike == DEPTH - 2
    writes = result.program.graph.find_nodes(op="call_function", target=torch.ops.aten.copy_.default)
    assert len(writes) == DEPTH


@pytest.mark.full
@pytest.mark.sample("nothing")
@pytest.mark.parametrize(
    "look",
    [
        lambda cache: 1.0,
        lambda cache: cache.layers[4].keys.sum(),
        lambda cache: cache.layers[4].values.shape[2],
        lambda cache: sum(layer.keys.sum() for layer in cache.layers),
    ],
    ids=["nothing", "keys of a layer between", "their length", "all keys"],
)
def test_keys_and_values_of_layers_between_stand_for_one_another(look: Callable[[Any], Any]) -> None:
    model = families.llama(num_hidden_layers=7).requires_grad_(False)
    inner = type(model.model)

    class Looking(inner):  # type: ignore[misc, valid-type]
        def forward(self, *args: Any, **rest: Any) -> Any:
            cache = rest.get(CACHE)
            scale = look(cache) if cache is not None and cache.layers else 1.0
            outputs = super().forward(*args, **rest)
            outputs.last_hidden_state = outputs.last_hidden_state * scale
            return outputs

    model.model.__class__ = Looking
    result = taken_over(model, with_past(model), mode="eval", flags=CACHED)
    assert result.alike == 5
    assert [spec.name for spec in result.program.inputs].count("past_4_key") == 1


@pytest.mark.slow
def test_which_inputs_stand_in() -> None:
    model = families.llama(num_hidden_layers=7)
    inputs = {axis.name: axis.example(torch.device("cpu")) for axis in with_past(model)}
    with traced_once(model, inputs) as repeats:
        stand_ins = repeats.hidden.stand_ins
    names = {f"past_{layer}_{part}": f"past_2_{part}" for layer in (3, 4, 5) for part in ("key", "value")}
    assert stand_ins == names
