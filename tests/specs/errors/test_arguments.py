"""Arguments of the wrong type raise coded errors and change nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import graftc
from graftc.specs.errors.diagnostics import GraftError
from tests.kit.refusals import refused

SPEC = {"adapt": [{"method": "lora", "rank": 2, "target": {"modules": ["0"]}}]}
INPUTS = (torch.ones(4, 6),)
NO_PATH: list[Any] = [None, 5, b"bytes", "", "a\0b", ["a"], {}]


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 3))


@pytest.fixture(scope="module")
def adapted_model(model: nn.Module) -> Any:
    return graftc.compile(SPEC, model, INPUTS)


@pytest.fixture(scope="module")
def artifact(adapted_model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(adapted_model.save(tmp_path_factory.mktemp("arguments") / "artifact"))


@pytest.mark.parametrize("path", NO_PATH, ids=repr)
def test_paths(path: Any, adapted_model: Any, model: nn.Module) -> None:
    merged = adapted_model.merge(allow_unchanged=True)
    for call in (adapted_model.save, adapted_model.export, merged.save, merged.export, lambda p: graftc.load(p, model)):
        refused(call, path, code="GC073")


@pytest.mark.parametrize("base", [5, {"a": 1}, nn.Linear, torch.ones(2), ["a"]], ids=str)
def test_bases(base: Any, artifact: Path) -> None:
    refused(graftc.load, artifact, base, code="GC073")
    refused(graftc.compile, SPEC, base, INPUTS, code="GC073")


def test_a_compiled_model_is_no_base(artifact: Path, adapted_model: Any) -> None:
    refused(graftc.load, artifact, adapted_model, code="GC073")


@pytest.mark.parametrize("seed", ["1", 1.0, True, 2**64, -(2**63) - 1, torch.tensor(1)], ids=repr)
def test_seeds(seed: Any, model: nn.Module) -> None:
    refused(graftc.compile, SPEC, model, INPUTS, seed=seed, code="GC073")


@pytest.mark.parametrize("seed", [-1, -(2**63), 2**64 - 1])
def test_seeds_of_64_bits_are_kept(seed: int, model: nn.Module, tmp_path: Path) -> None:
    seeded = graftc.compile(SPEC, model, INPUTS, seed=seed)
    loaded = graftc.load(seeded.save(tmp_path / "artifact"), model)
    assert loaded.compilation.seed == seed


NO_INPUTS = {"number": 5, "text": "x", "numbered": {1: torch.ones(2)}, "iterator": iter([]), "set": {1, 2}}


@pytest.mark.parametrize("inputs", NO_INPUTS.values(), ids=NO_INPUTS)
def test_example_inputs(inputs: Any, model: nn.Module, adapted_model: Any, tmp_path: Path) -> None:
    for call in (graftc.compile, graftc.check):
        refused(call, SPEC, model, inputs, code="GC073")
    refused(graftc.roles, model, inputs, code="GC073")
    refused(adapted_model.export, tmp_path / "model.pt2", "pt2", inputs, code="GC073")


def test_one_tensor_is_the_only_input(model: nn.Module) -> None:
    assert graftc.compile(SPEC, model, INPUTS[0]).compilation.main.axes == (
        graftc.compile(SPEC, model, INPUTS).compilation.main.axes
    )


@pytest.mark.parametrize("how", ["none", "number", "number for a tensor", "list", "number for a name", "text"])
def test_adapter_tensors(how: str, adapted_model: Any) -> None:
    own = adapted_model.adapter_state_dict()
    name = next(iter(own))
    given: dict[str, Any] = {
        "none": None,
        "number": 5,
        "number for a tensor": {**own, name: 1},
        "list": list(own.items()),
        "number for a name": {**own, 1: own[name]},
        "text": {**own, name: "tensor"},
    }
    before = {n: t.clone() for n, t in own.items()}
    refused(adapted_model.load_adapter_state_dict, given[how], code="GC073")
    assert all(torch.equal(t, before[n]) for n, t in adapted_model.adapter_state_dict().items())


@pytest.mark.parametrize("value", [None, 1, "tensor", [1.0]], ids=repr)
def test_base_tensors_of_a_state_dict(value: Any, adapted_model: Any) -> None:
    refused(adapted_model.load_state_dict, {**adapted_model.state_dict(), "0.weight": value}, code="GC073")


@pytest.mark.parametrize("other", [5, None, nn.Linear(2, 2), "model"], ids=repr)
def test_joined(other: Any, adapted_model: Any) -> None:
    refused(adapted_model.joined, other, code="GC073")


@pytest.mark.parametrize("names", [5, None, "lora", {"lora"}], ids=repr)
def test_combined(names: Any, adapted_model: Any) -> None:
    refused(adapted_model.combine, names, code="GC073")


@pytest.mark.parametrize("budget", [float("inf"), float("nan"), -1, -1e-9, True, "1", [1.0]], ids=repr)
def test_budgets(budget: Any, adapted_model: Any) -> None:
    refused(adapted_model.merge, budget=budget, code="GC073")
    refused(adapted_model.merge_partially, budget, code="GC073")


class Keyword(nn.Module):
    """A model whose second input is keyword-only."""

    def __init__(self) -> None:
        super().__init__()
        self.add_module("0", nn.Linear(6, 8))

    def forward(self, x: torch.Tensor, *, k: torch.Tensor | None = None) -> torch.Tensor:
        y: torch.Tensor = self._modules["0"](x)  # type: ignore[misc]
        return y if k is None else y + k.sum()


@pytest.mark.slow
def test_what_goes_by_name_only_is_not_positional() -> None:
    compiled = graftc.compile(SPEC, Keyword(), INPUTS)
    with pytest.raises(GraftError, match="2 positional inputs; the model takes 1") as caught:
        compiled(*INPUTS, *INPUTS)
    assert caught.value.code == "GC031"
    assert torch.equal(compiled(*INPUTS, k=INPUTS[0]), compiled(*INPUTS) + 24)


def test_an_adapter_that_adds_to_an_input_reads_it() -> None:
    spec = {"adapt": [{"method": "bottleneck", "bottleneck": 2, "adds_to": "input", "target": {"modules": ["0"]}}]}
    with pytest.raises(GraftError, match="must read it") as caught:
        graftc.compile(spec, nn.Sequential(nn.Linear(6, 8)), INPUTS)
    assert caught.value.code == "GC002"
