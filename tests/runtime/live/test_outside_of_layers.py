"""Uses of layers by a model's own Python besides calling them: they work as in the source, or are refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import graftc
from graftc.passes.core.elements.calls import elements_in
from graftc.testing import perturb

LORA: dict[str, Any] = {"method": "lora", "rank": 2, "target": {"modules": "**.{up,down}"}}
SPEC: dict[str, Any] = {"adapt": [LORA]}
X = torch.randn(3, 5, 8)


class Layer(nn.Module):
    """A layer with two maps, whose result is scaled by a number."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)
        self.scale = 1.0

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.scale * self.down(torch.relu(self.up(x)))
        return y


class Plain(nn.Module):
    """A model that is not a graph, because it reads a value."""

    layer: type[Layer] = Layer

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(self.layer() for _ in range(3))
        self.last = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Any:
        if float(x.mean()) > 1e6:
            x = 2 * x
        return self.last(self.through(x))

    def through(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class Sets(Plain):
    """A model that sets an attribute of each layer before it calls the layer."""

    def through(self, x: Tensor) -> Tensor:
        for number, layer in enumerate(self.layers):
            layer.scale = 1.0 + number
            x = layer(x)
        return x


class CallsInside(Plain):
    """A model that also calls a map of a layer directly."""

    def through(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x) + layer.up(x)[..., :8]  # type: ignore[operator]
        return x


class Counts(Plain):
    """A model whose layers count their calls."""

    class layer(Layer):  # noqa: N801, it is the attribute that the class above has
        def forward(self, x: Tensor) -> Tensor:
            self.scale += 1.0
            return super().forward(x)


class Moving(Plain):
    """A model whose layers have moving means."""

    class layer(Layer):  # noqa: N801
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(5)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.norm(super().forward(x))
            return y


class Recomputes(Plain):
    """A model with its own checkpointing."""

    def through(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False)
        return x


class Collects(Plain):
    """A model with a list that its layers append to."""

    class layer(Layer):  # noqa: N801
        def forward(self, x: Tensor, seen: Any = None) -> Tensor:  # type: ignore[override]
            y = super().forward(x)
            seen.append(y.mean())
            return y

    def through(self, x: Tensor) -> Tensor:
        seen: list[Tensor] = []
        for layer in self.layers:
            x = layer(x, seen)
        return x * torch.stack(seen).sum()


def model_and_compiled(cls: type[Plain], spec: Any = SPEC) -> tuple[Plain, Any]:
    torch.manual_seed(0)
    model = cls().eval()
    return model, graftc.compile(spec, model, (X,), cache=False).eval()


@pytest.mark.sample("True-Counts", "True-Collects")
@pytest.mark.slow
@pytest.mark.parametrize("cls", [Plain, Sets, CallsInside, Counts, Moving, Recomputes, Collects])
@pytest.mark.parametrize("training", [True, False])
def test_it_is_the_source_and_merges(cls: type[Plain], training: bool) -> None:
    model, compiled = model_and_compiled(cls)
    reference, before = copy.deepcopy(model).train(training), copy.deepcopy(model.state_dict())
    compiled.train(training)
    for _ in range(2):
        assert torch.equal(compiled(X), reference(X))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    if cls is Counts:  # each copy counts by itself
        return
    perturb(compiled.eval(), 0.1)
    assert torch.allclose(compiled.merge()(X), compiled(X), atol=1e-4)
    compiled.train(training)(X).square().sum().backward()
    assert all(p.grad is not None for p in compiled.parameters() if p.requires_grad)


@pytest.mark.sample("Collects", "CallsInside")
@pytest.mark.slow
@pytest.mark.parametrize("cls", [Sets, CallsInside, Counts, Collects])
def test_such_layers_are_no_graphs_and_their_maps_are(cls: type[Plain]) -> None:
    _, compiled = model_and_compiled(cls)
    assert set(elements_in(compiled.compilation.flags)) == {
        "last",
        *(f"layers.{number}.{name}" for number in range(3) for name in ("up", "down")),
    }


class Later(Plain):
    """A model that may do what the example did not show."""

    def forward(self, x: Tensor, other: Callable[[Plain], Any] | None = None) -> Any:
        if other is not None:
            other(self)
        return super().forward(x)


@pytest.mark.slow
@pytest.mark.parametrize(
    "other, message",
    [
        (lambda model: setattr(model.layers[1], "scale", 3.0), "sets scale of layers.1"),
        (lambda model: model.layers[1].up(X), "layers.1.up is called directly"),
        (lambda model: model.layers[1].train(), "sets training of layers.1"),
    ],
)
def test_what_it_was_not_shown_is_refused(other: Callable[[Plain], Any], message: str) -> None:
    _, compiled = model_and_compiled(Later)
    with pytest.raises(graftc.GraftError, match=message) as caught:
        compiled(X, other)
    assert caught.value.code == "GC031"
    compiled(X)


class Reads(Plain):
    """A model that reads the weight of a map, besides calling the map."""

    def through(self, x: Tensor) -> Tensor:
        return super().through(x) @ self.last.weight.T @ self.last.weight


@pytest.mark.full
@pytest.mark.sample("method1")
@pytest.mark.slow
@pytest.mark.parametrize(
    "method", [LORA | {"target": {"modules": "last"}}, {"method": "full", "target": {"modules": "last"}}]
)
def test_an_adaptation_of_what_it_reads_is_refused(method: dict[str, Any]) -> None:
    words = r"adapts last\.weight, which the model's own Python code also reads"
    with pytest.raises(graftc.GraftError, match=words) as caught:
        model_and_compiled(Reads, {"adapt": [method]})
    assert caught.value.code == "GC149"
    model, compiled = model_and_compiled(Reads)
    assert torch.equal(compiled(X), model(X))


@pytest.mark.sample("layers.1")
@pytest.mark.slow
@pytest.mark.parametrize("path", ["", "layers.1", "layers.1.up", "last"])
def test_hooks_of_the_source_act_once(path: str) -> None:
    torch.manual_seed(0)
    model = Plain().eval()
    model.get_submodule(path).register_forward_hook(lambda module, args, result: 2 * result)
    if path:  # the whole model gets its inputs by name
        model.get_submodule(path).register_forward_pre_hook(lambda module, args: (3 * args[0],))
    compiled = graftc.compile(SPEC, model, (X,), cache=False).eval()
    assert torch.equal(compiled(X), model(X))


@pytest.mark.sample("last")
@pytest.mark.slow
@pytest.mark.parametrize("path", ["", "layers.1", "last"])
def test_hooks_of_the_compiled_model_act_once(path: str) -> None:
    model, compiled = model_and_compiled(Plain)
    for each in (model, compiled):
        each.get_submodule(path).register_forward_hook(lambda module, args, result: 2 * result)
    assert torch.equal(compiled(X), model(X))


@pytest.mark.slow
def test_a_hook_inside_of_a_layer_is_refused() -> None:
    _, compiled = model_and_compiled(Plain)
    handle = compiled.get_submodule("layers.1.up").register_forward_hook(lambda *_: None)
    with pytest.raises(graftc.GraftError, match=r"GC043: layers\.1\.up has a hook"):
        compiled(X)
    handle.remove()
    compiled(X)


class Mixed(Plain):
    """A model that enables autocast inside."""

    def through(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return super().through(x).float()


@pytest.mark.sample("dtype0")
@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_is_as_in_the_source(dtype: torch.dtype) -> None:
    model, compiled = model_and_compiled(Plain)
    inner, own = model_and_compiled(Mixed)
    with torch.autocast("cpu", dtype):
        assert torch.equal(compiled(X), model(X))
    assert torch.equal(own(X), inner(X))


@pytest.mark.parametrize(
    "spec",
    [
        {"adapt": [{"method": "adamix"}]},
        {"adapt": [{"method": "prefix", "positions": "shifted"}]},
        {"adapt": [{"method": "p_tuning_v2"}]},
        {**SPEC, "base": {"quantize": "int8"}, "layer_replication": [[0, 2], [1, 3]]},
        {"adapt": [LORA, {**LORA, "name": "b"}], "compose": [{"gate": ["lora", "b"]}]},
    ],
)
def test_what_is_of_the_whole_is_refused(spec: dict[str, Any]) -> None:
    with pytest.raises(graftc.GraftError) as caught:
        model_and_compiled(Plain, spec)
    assert caught.value.code == "GC149"


@pytest.mark.slow
def test_replicated_layers_run_in_their_order() -> None:
    model, compiled = model_and_compiled(Plain, {**SPEC, "layer_replication": [[0, 2], [1, 3]]})
    deeper = copy.deepcopy(model)
    deeper.layers = nn.ModuleList(model.layers[number] for number in (0, 1, 1, 2))
    assert torch.equal(compiled(X), deeper(X))


@pytest.mark.slow
def test_it_warms_up() -> None:
    model, compiled = model_and_compiled(Moving)
    before = copy.deepcopy(compiled.train().state_dict())
    compiled.warm_up({"x": X})
    assert all(torch.equal(tensor, before[name]) for name, tensor in compiled.state_dict().items())
    assert torch.equal(compiled.eval()(X), model(X))


class Notes:
    """An object that is not a tensor, a plain value or a container of these."""


class Noting(Layer):
    """A layer that takes an argument that no graph takes."""

    def forward(self, x: Tensor, notes: Notes | None = None) -> Tensor:
        return super().forward(x)


class HandsNotes(Plain):
    """A model that passes `Notes` to its layers."""

    layer = Noting

    def through(self, x: Tensor) -> Tensor:
        notes = Notes()
        for layer in self.layers:
            x = layer(x, notes)
        return x


@pytest.mark.slow
def test_what_a_layer_is_called_with_is_said_where_no_graph_takes_it() -> None:
    model = HandsNotes()
    compiled = graftc.compile(SPEC, model, (X,), cache=False)
    (stack,) = compiled.report.stacks
    assert stack.level == "modules" and "layers.0 is called with a Notes" in stack.reason
    assert torch.equal(compiled(X), model(X))
    with pytest.raises(graftc.GraftError, match=r"layers\.0 is called with a Notes"):
        graftc.compile({**SPEC, "capture": "layers"}, model, (X,), cache=False)


class Keyed(Plain):
    """A model with a map whose name is not an identifier."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleDict({"2-1": nn.Linear(8, 8)})

    def through(self, x: Tensor) -> Tensor:
        return self.parts["2-1"](super().through(x))  # type: ignore[no-any-return]


@pytest.mark.slow
def test_names_of_modules_need_not_be_identifiers() -> None:
    model = Keyed()
    spec = {"adapt": [{**LORA, "target": {"modules": ["**.up", "parts.2-1"]}}]}
    compiled = graftc.compile(spec, model, (X,), cache=False)
    assert torch.equal(compiled(X), model(X))
    perturb(compiled)
    torch.testing.assert_close(compiled.merge()(X), compiled(X), rtol=1e-5, atol=1e-5)
