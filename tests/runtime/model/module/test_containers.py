"""Modules of a compiled model match the source's class, structure, attributes and mode; any other use is refused."""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graftc
from graftc.runtime.model.blocks import Block
from graftc.specs.errors.diagnostics import GraftError, GraftWarning

LORA = {"method": "lora", "rank": 2, "target": {"modules": "**.linear"}}


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm, self.drop = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.3)
        self.scale, self.kind = 2.0, "layer"

    def forward(self, states: Tensor) -> Tensor:
        return states + self.scale * self.drop(self.norm(self.linear(states)))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = 1.5
        self.layers = nn.ModuleList([Layer(), Layer(), Layer()])
        self.heads = nn.ModuleDict({"a": nn.Linear(4, 3), "b": nn.Linear(4, 3, bias=False)})
        self.tail = nn.Sequential(nn.LayerNorm(4), nn.Dropout(0.5), nn.Identity())
        self.absent = None

    def forward(self, inputs: Tensor) -> Tensor:
        for layer in self.layers:
            inputs = layer(inputs)
        inputs = self.tail(inputs) * self.scale
        return self.heads["a"](inputs) + self.heads["b"](inputs)


@pytest.fixture(scope="module")
def both() -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    model = Model().train().requires_grad_(False)
    return model, graftc.compile({"adapt": [LORA]}, model, (torch.randn(3, 4),), cache=False)


@pytest.fixture
def adapted_model(both: tuple[nn.Module, Any]) -> Any:
    return copy.deepcopy(both[1]).train()


@pytest.mark.slow
def test_classes_structure_and_attributes(both: tuple[nn.Module, Any]) -> None:
    model, compiled = both
    for path, source in model.named_modules():
        module = compiled.get_submodule(path)
        if path:
            assert isinstance(module, type(source)) and module._get_name() == source._get_name(), path
            assert module.extra_repr() == source.extra_repr()
        assert list(module._modules)[: len(source._modules)] == list(source._modules)
    assert len(compiled.layers) == 3 and isinstance(compiled.layers[0], Layer | Block)
    assert compiled.layers[-1] is list(compiled.layers)[2] and compiled.layers[1] in compiled.layers
    assert list(compiled.layers[1:]) == [compiled.layers[1], compiled.layers[2]]
    assert [type(m).__name__ for m in compiled.tail[:2]] == ["LayerNorm", "Dropout"]
    assert list(compiled.heads) == ["a", "b"] and "a" in compiled.heads and compiled.heads["b"].bias is None
    assert compiled.layers[0].norm.eps == 1e-5 and compiled.layers[0].norm.num_features == 4
    assert compiled.tail[0].normalized_shape == (4,) and compiled.tail[1].p == 0.5 and compiled.layers[0].scale == 2.0
    assert sum(isinstance(m, nn.Dropout) for m in compiled.modules()) == 4
    assert repr(compiled.tail[0]) == repr(model.tail[0])


EDITS: dict[str, Callable[[Any], Any]] = {
    "another dropout": lambda m: setattr(m.layers[0], "drop", nn.Identity()),
    "another norm": lambda m: setattr(m.layers[0], "norm", nn.Identity()),
    "another map": lambda m: setattr(m.layers[0], "linear", nn.Linear(4, 4)),
    "no module": lambda m: setattr(m.layers[0], "norm", None),
    "layers in another order": lambda m: m.layers.__setitem__(0, m.layers[1]),
    "a layer less": lambda m: m.layers.__delitem__(0),
    "a module less": lambda m: delattr(m.layers[0], "norm"),
    "another head": lambda m: setattr(m, "heads", nn.ModuleDict()),
    "no weight": lambda m: setattr(m.heads["a"], "weight", None),
    "a bias less": lambda m: delattr(m.heads["a"], "bias"),
    "no buffer": lambda m: setattr(m.layers[0].norm, "running_mean", None),
    "a parametrization": lambda m: nn.utils.parametrizations.weight_norm(m.heads["a"]),
}


@pytest.mark.parametrize("edit", EDITS)
def test_the_tree_cannot_be_another_than_the_graphs(adapted_model: Any, edit: str) -> None:
    """An edit of the module tree raises GC043, and the model still computes the same."""
    x = torch.randn(3, 4)
    before = adapted_model.eval()(x)
    with pytest.raises(GraftError) as caught:
        EDITS[edit](adapted_model)
    assert caught.value.code == "GC043" and torch.equal(adapted_model(x), before)


def test_what_stays_the_same_may_be_set(adapted_model: Any) -> None:
    """An unchanged module, a tensor of the same kind and a module under a new name may be set."""
    x = torch.randn(3, 4)
    before = adapted_model.eval()(x)
    adapted_model.heads["a"].bias = nn.Parameter(adapted_model.heads["a"].bias.detach().clone(), requires_grad=False)
    adapted_model.layers[0].norm = adapted_model.layers[0].norm
    adapted_model.metric = nn.Identity()
    assert torch.equal(adapted_model(x), before)


def frozen_norms(module: nn.Module) -> None:
    for each in module.modules():
        if isinstance(each, nn.BatchNorm1d):
            each.eval()


MODES: dict[str, Callable[[Any], Any]] = {
    "norms": frozen_norms,
    "dropouts": lambda m: [each.eval() for each in m.modules() if isinstance(each, nn.Dropout)],
    "a layer": lambda m: m.layers[1].eval(),
    "by a flag": lambda m: setattr(m.layers[2].norm, "training", False),
    "all below": lambda m: [each.eval() for each in m.children()],
    "norms of an eval model": lambda m: (m.eval(), m.layers[0].norm.train()),
}


@pytest.mark.parametrize("change", MODES)
def test_modes_of_submodules_are_those_of_the_graph(
    both: tuple[nn.Module, Any], adapted_model: Any, change: str
) -> None:
    twin = copy.deepcopy(both[0]).train()
    for module in (twin, adapted_model):
        MODES[change](module)
    inputs = torch.randn(6, 4)
    for _ in range(2):
        torch.manual_seed(3)
        expected = twin(inputs)
        torch.manual_seed(3)
        torch.testing.assert_close(adapted_model(inputs), expected)
    for name, buffer in twin.named_buffers():
        torch.testing.assert_close(adapted_model.get_buffer(name), buffer)
    flags = [module.training for module in adapted_model.modules()]
    adapted_model.merge(allow_unchanged=True)
    assert [module.training for module in adapted_model.modules()] == flags
    with adapted_model.disabled():
        assert adapted_model(inputs).shape == expected.shape


@pytest.mark.slow
def test_the_source_modules_modes_are_taken_over() -> None:
    model = Model().train().requires_grad_(False)
    frozen_norms(model)
    compiled = graftc.compile({"adapt": [LORA]}, model, (torch.randn(3, 4),), cache=False)
    assert [m.training for m in model.layers.modules()] == [
        compiled.layers.get_submodule(path).training for path, _ in model.layers.named_modules()
    ]
    before = {name: buffer.clone() for name, buffer in compiled.named_buffers()}
    compiled(torch.randn(4, 4))
    assert all(torch.equal(buffer, before[name]) for name, buffer in compiled.named_buffers())


HOOKS = ("register_full_backward_hook", "register_full_backward_pre_hook")


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("path", ["tail", "layers.1.drop", "layers.0.linear", "heads.a", "layers"])
def test_a_hook_that_never_fires_is_refused(adapted_model: Any, path: str, hook: str) -> None:
    with pytest.raises(GraftError, match="GC043"):
        getattr(adapted_model.get_submodule(path), hook)(lambda *_: None)


def test_hooks_of_layers_and_of_the_model_fire(adapted_model: Any) -> None:
    seen: list[str] = []
    adapted_model.layers[0].register_forward_hook(lambda *_: seen.append("layer"))
    adapted_model.register_forward_hook(lambda *_: seen.append("model"))
    adapted_model(torch.randn(2, 4))
    assert seen == ["layer", "model"]


@pytest.mark.parametrize("path", ["tail", "layers.0", "heads.a", "layers.1.norm"])
def test_a_part_cannot_be_called(adapted_model: Any, path: str) -> None:
    with pytest.raises(GraftError, match="GC043"):
        adapted_model.get_submodule(path)(torch.randn(2, 4))


@pytest.mark.parametrize(
    "path, name", [("", "scale"), ("layers.0", "scale"), ("tail.1", "p"), ("layers.1.norm", "eps")]
)
def test_setting_a_constant_is_warned_of(adapted_model: Any, path: str, name: str) -> None:
    with pytest.warns(GraftWarning, match=f"GC048.*{name}"):
        setattr(adapted_model.get_submodule(path), name, 0.25)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adapted_model.note_of_my_own = 3.0


UNFREEZE: dict[str, Callable[[Any], Any]] = {
    "a loop": lambda m: [p.requires_grad_(True) for p in m.heads.parameters()],
    "a module": lambda m: m.heads["a"].requires_grad_(True),
    "everything": lambda m: m.requires_grad_(True),
    "an attribute": lambda m: setattr(m.layers[0].norm.weight, "requires_grad", True),
    "by name": lambda m: m.get_parameter("layers.1.linear.weight").requires_grad_(True),
}


@pytest.mark.parametrize("way", UNFREEZE)
def test_unfrozen_base_tensors_are_refused(adapted_model: Any, way: str) -> None:
    trained = {name for name, p in adapted_model.named_parameters() if p.requires_grad}
    UNFREEZE[way](adapted_model)
    with pytest.raises(GraftError, match=r"GC044.*\n.*train: \["):
        adapted_model(torch.randn(4, 4))
    with torch.no_grad():
        adapted_model(torch.randn(4, 4))
    for name, parameter in adapted_model.named_parameters():
        parameter.requires_grad_(name in trained)
    adapted_model(torch.randn(4, 4)).sum().backward()


def test_looking_for_unfrozen_tensors_costs_little(adapted_model: Any) -> None:
    runner, inputs = adapted_model._graftc, torch.randn(64, 4)
    adapted_model(inputs)
    started = time.perf_counter()
    for _ in range(100):
        runner._check_frozen()
    assert (time.perf_counter() - started) / 100 / len(runner.derived["frozen"]) < 5e-6
