"""The input of a site is replaced for this site only, below what is inserted there and above what comes before."""

from __future__ import annotations

from itertools import permutations
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graftc
from graftc.passes.core.weights.folds import Keep
from graftc.passes.methods.ia3 import IA3Method
from graftc.passes.methods.lora import LoRAMethod
from graftc.runtime.deploy.merged import fold
from graftc.runtime.model.runner import runner_of
from graftc.testing import largest_difference, outputs_of, perturb, same_bits
from graftc.testing.families import tiny
from tests.kit.models import adapted


class Chain(nn.Module):
    """A linear map whose result two others read directly."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(6, 10), nn.Linear(10, 4), nn.Linear(10, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Map ``[batch, 6]`` to ``[batch, 4]`` and ``[batch, 3]``."""
        hidden = self.first(x)
        return self.second(hidden), self.third(hidden)


LORA = {"method": "lora", "rank": 2, "alpha": 2, "dropout": 0.1}
INPUT = {"method": "ia3", "side": "input"}
ENTRIES = {
    "lora below": {**LORA, "target": {"modules": "first"}},
    "lora": {**LORA, "target": {"modules": ["second", "third"]}},
    "second": {**INPUT, "target": {"modules": "second"}},
    "third": {**INPUT, "target": {"modules": "third"}},
}


def chained(order: tuple[str, ...], model: nn.Module | None = None) -> tuple[Any, dict[str, Tensor]]:
    """Return `Chain` in double precision with these adaptations, in eval mode and perturbed, and its inputs."""
    entries = [{**ENTRIES[name], "name": name.replace(" ", "_")} for name in order]
    inputs = {"x": torch.randn(7, 6, dtype=torch.float64)}
    return adapted(model or Chain().double(), *entries, inputs=inputs, noise=0.3), inputs


@pytest.mark.parametrize("order", [*permutations(ENTRIES, 2), *permutations(ENTRIES, 4)], ids=", ".join)
def test_every_order_folds_to_what_it_computes(order: tuple[str, ...]) -> None:
    """Every order folds, also if a site reads the result of another one that is adapted before or after it."""
    compiled, inputs = chained(order)
    merged = compiled.merge()
    assert merged.certificate.passed
    assert largest_difference(outputs_of(merged, inputs), outputs_of(compiled, inputs)) <= 1e-12


@pytest.mark.parametrize("order", [*permutations(("lora below", "second", "third"))], ids=", ".join)
@pytest.mark.parametrize("kept", ["lora", "ia3"])
def test_part_of_them_folds(order: tuple[str, ...], kept: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Taking the folded ones out of the graph leaves the other replacements in place."""
    compiled, inputs = chained(order)
    before = outputs_of(compiled, inputs)
    method: Any = LoRAMethod if kept == "lora" else IA3Method
    monkeypatch.setattr(method, "fold", lambda *args: Keep("it is told to stay"))
    merged = fold(runner_of(compiled))
    assert set(merged.kept) == ({"lora_below"} if kept == "lora" else {"second", "third"})
    assert merged.certificate.passed
    assert largest_difference(outputs_of(merged, inputs), before) <= 1e-12


def test_formula() -> None:
    """A vector on the input of one map does not affect the other, and applies after the update of the map below."""
    model = Chain().double()
    compiled, inputs = chained(("second", "lora below", "lora"), model)
    tensors = {name: tensor.detach() for name, tensor in compiled.adapter_state_dict().items()}

    def low_rank(module: str, name: str) -> Tensor:
        return tensors[f"{module}.graftc.{name}.B"] @ tensors[f"{module}.graftc.{name}.A"]

    hidden = inputs["x"] @ (model.first.weight + low_rank("first", "lora_below")).T + model.first.bias
    scale = tensors["second.graftc.second.l"]
    expected = [
        hidden @ (model.second.weight * scale + low_rank("second", "lora")).T + model.second.bias,
        hidden @ (model.third.weight + low_rank("third", "lora")).T + model.third.bias,
    ]
    assert largest_difference(outputs_of(compiled, inputs), expected) <= 1e-12


def test_training_reads_the_same() -> None:
    """Without dropout, the train graph computes the same as the eval graph, and gradients reach every tensor."""
    order = ("lora", "second", "lora below")
    entries = [{**ENTRIES[name], "name": name.replace(" ", "_"), "dropout": 0.0} for name in order if "lora" in name]
    entries.insert(1, {**ENTRIES["second"], "name": "second"})
    inputs = {"x": torch.randn(7, 6, dtype=torch.float64)}
    compiled = graftc.compile({"adapt": entries}, Chain().double(), inputs)
    perturb(compiled, 0.3)
    trained = list(compiled.train()(**inputs))
    sum(t.sum() for t in trained).backward()
    assert largest_difference(trained, outputs_of(compiled, inputs)) <= 1e-12
    assert all(bool(t.grad.any()) for t in compiled.parameters() if t.requires_grad)


@pytest.mark.slow
def test_base_dropout_before_a_site() -> None:
    """A base dropout that a site reads is gone in eval mode, and its input is scaled instead."""
    model = tiny("t5", dropout_rate=0.1)
    compiled = graftc.compile({"adapt": [{"method": "ia3", "target": {"role": "ffn.down"}}]}, model).eval()
    targets = {node.target for node in compiled.program("eval").graph.nodes}
    assert torch.ops.aten.dropout.default not in targets
    perturb(compiled, 0.1)
    assert compiled.merge().certificate.passed


class Images(nn.Module):
    """A depthwise convolution, a pointwise one, and a matrix that multiplies its input from the left."""

    def __init__(self) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(6, 12, 3, padding=1, groups=6)
        self.pointwise = nn.Conv2d(12, 5, 1)
        self.before = nn.Linear(5, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[batch, 6, height, width]`` to ``[batch, 4, height * width]``."""
        hidden = torch.relu(self.pointwise(torch.relu(self.depthwise(x)))).flatten(2)
        return self.before.weight @ hidden


def imaged(entry: dict[str, Any]) -> tuple[Any, dict[str, Tensor], nn.Module]:
    """Return `Images` in double precision, frozen, with one adaptation and in eval mode, its inputs and the source.

    A matrix to the left of its input uses another kernel if it requires a gradient: one ``mm`` instead of a ``bmm``.
    """
    model, inputs = Images().double().requires_grad_(False), {"x": torch.randn(2, 6, 7, 9, dtype=torch.float64)}
    return graftc.compile({"adapt": [entry]}, model, inputs).eval(), inputs, model


@pytest.mark.parametrize(
    ("modules", "fields"),
    [
        (["pointwise", "before"], {"method": "ia3", "side": "input"}),
        (["depthwise", "pointwise", "before"], {"method": "ia3"}),
        (["depthwise", "pointwise", "before"], {"method": "vera", "rank": 7}),
        (["depthwise", "pointwise", "before"], {"method": "loha", "rank": 2}),
        (["depthwise", "pointwise", "before"], {"method": "lokr", "rank": 1}),
        (["depthwise", "pointwise", "before"], {"method": "oft", "blocks": 1}),
        (["depthwise", "pointwise", "before"], {"method": "boft", "blocks": 1}),
        (["depthwise", "pointwise", "before"], {"method": "miss", "rank": 4}),
    ],
    ids=["input", "output", "vera", "loha", "lokr", "oft", "boft", "miss"],
)
def test_axes(modules: list[str], fields: dict[str, Any]) -> None:
    """Channels and rows are found on whichever axis a map has them, also in the groups of a convolution."""
    compiled, inputs, model = imaged({**fields, "target": {"modules": modules}})
    assert same_bits(outputs_of(compiled, inputs), outputs_of(model, inputs))
    perturb(compiled, 0.3)
    assert largest_difference(outputs_of(compiled, inputs), outputs_of(model, inputs)) > 1e-2
    merged = compiled.merge()
    assert merged.certificate.passed
    assert largest_difference(outputs_of(merged, inputs), outputs_of(compiled, inputs)) <= 1e-12


@pytest.mark.parametrize("trains", [False, True], ids=["frozen", "trains"])
def test_identity_is_with_the_same_weights_frozen(trains: bool) -> None:
    """The base's results depend on which weights require a gradient; inside ``disabled()`` none of them does."""
    model, inputs = Images().double(), {"x": torch.randn(2, 6, 7, 9, dtype=torch.float64)}
    spec = {"train": ["before"] * trains, "adapt": [{"method": "ia3", "target": {"modules": "depthwise"}}]}
    compiled = graftc.compile(spec, model, inputs).eval()
    model.requires_grad_(False).before.requires_grad_(trains)
    assert same_bits(outputs_of(compiled, inputs), outputs_of(model, inputs))
    perturb(compiled, 0.3)
    with compiled.disabled():
        assert same_bits(outputs_of(compiled, inputs), outputs_of(model.requires_grad_(False), inputs))


@pytest.mark.parametrize("modules", ["depthwise", "pointwise"])
def test_a_channel_scales_all_points_of_a_patch(modules: str) -> None:
    """On the input of a convolution, with or without groups, it equals the source on scaled channels."""
    compiled, inputs, model = imaged({"method": "ia3", "side": "input", "target": {"modules": modules}})
    perturb(compiled, 0.3)
    (scale,) = (tensor.detach() for name, tensor in compiled.adapter_state_dict().items() if name.endswith(".l"))
    module: Any = model.get_submodule(modules)
    assert scale.shape == (module.in_channels,)
    hook = module.register_forward_pre_hook(lambda _, given: (given[0] * scale[:, None, None],))
    expected = outputs_of(model, inputs)
    hook.remove()
    assert largest_difference(outputs_of(compiled, inputs), expected) < 1e-12
    assert largest_difference(outputs_of(compiled.merge().module, inputs), expected) < 1e-12
