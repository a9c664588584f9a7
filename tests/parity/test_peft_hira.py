"""HiRA compared with the installed peft in float64: outputs, gradients, steps and merged outputs, on layers,
convolutions and tables.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graftc
from graftc.runtime.model.runner import runner_of
from graftc.specs.errors.diagnostics import GraftError
from graftc.testing import perturb
from graftc.testing.families import tiny
from tests.kit.comparing import every_tensor
from tests.kit.releases import peft_config
from tests.parity.support import MODULES, Case, Names, check_float64, check_nothing_is_written, globs

HIRA = Names({"A": "hira_A.default", "B": "hira_B.default"})
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "random": ({"init": "random"}, {"init_weights": False}),
}


@pytest.mark.slow
@pytest.mark.sample("plain-llama")
@pytest.mark.parametrize("family", MODULES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_layers(variant: str, family: str) -> None:
    modules, (ours, theirs) = MODULES[family], VARIANTS[variant]
    adaptation = {"method": "hira", "target": globs(modules), "rank": 4, **ours}
    fields = {"r": 4, "target_modules": modules, "fan_in_fan_out": family == "gpt2", **theirs}
    check_float64(Case(family, adaptation, lambda _: peft_config("HiraConfig", **fields), HIRA, noise=0.2))


class Pixels(nn.Module):
    """A table and three convolutions, one of them over single points and one of them one-dimensional."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 6)
        self.wide, self.point = nn.Conv2d(6, 8, 3, padding=1, stride=2), nn.Conv2d(8, 7, 1)
        self.line = nn.Conv1d(7, 5, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Map integers ``[batch, 5, 7]`` to ``[batch, 5, 10]``."""
        hidden = self.point(torch.relu(self.wide(self.table(x).movedim(-1, 1))))
        outputs: Tensor = self.line(torch.tanh(hidden).flatten(2))
        return outputs


@pytest.mark.slow
def test_convolutions_and_a_table() -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    base, x = Pixels().double(), torch.randint(0, 11, (3, 5, 7))
    names = ["table", "wide", "point", "line"]
    config = peft_config("HiraConfig", r=3, target_modules=names)
    theirs = peft.get_peft_model(copy.deepcopy(base), config).double().eval()
    spec = {"adapt": [{"method": "hira", "target": {"modules": names}, "rank": 3}]}
    ours = graftc.compile(spec, copy.deepcopy(base), {"x": x}).eval()
    perturb(ours, 0.2)
    peft_tensors, mine = every_tensor(theirs), dict(ours.named_parameters())
    counterparts: dict[str, Tensor] = {}
    with torch.no_grad():
        for name, tensor in ours.adapter_state_dict().items():
            table = f"base_model.model.table.hira_embedding_{name[-1]}.default"
            other = counterparts[name] = peft_tensors[table if name.startswith("table.") else HIRA.of(name)]
            other.copy_(tensor.reshape(other.shape))
    assert len(counterparts) == 8
    assert float((ours(x) - base(x)).detach().abs().max()) > 1e-2
    torch.testing.assert_close(ours(x), theirs(x), rtol=0, atol=1e-13)
    noise = torch.randn(ours(x).shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for model in (ours, theirs):
        (model(x) * noise).sum().backward()
    for name, other in counterparts.items():
        a, b = mine[name].grad, other.grad
        assert a is not None and b is not None and bool(a.any())
        torch.testing.assert_close(a, b.reshape(a.shape), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ours.merge()(x), theirs.merge_and_unload()(x), rtol=0, atol=1e-13)


@pytest.mark.full
@pytest.mark.parametrize("start", [True, "gaussian", False])
def test_starts_have_the_distribution_of_pefts(start: bool | str) -> None:
    """A config gives factors with the bounds, deviations and zeros of peft's, at layers, convolutions and tables."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    base, names = Pixels(), ["table", "wide", "point", "line"]
    config = peft_config("HiraConfig", r=5, target_modules=names, init_weights=start)
    drawn: dict[str, tuple[list[Tensor], list[Tensor]]] = {}
    for seed in range(20):
        ours = graftc.compile(config, base, {"x": torch.zeros(1, 5, 7, dtype=torch.int64)}, seed=seed)
        torch.manual_seed(seed)
        theirs = every_tensor(peft.get_peft_model(copy.deepcopy(base), config))
        for name, tensor in ours.adapter_state_dict().items():
            table = f"base_model.model.table.hira_embedding_{name[-1]}.default"
            pair = drawn.setdefault(name, ([], []))
            pair[0].append(tensor)
            pair[1].append(theirs[table if name.startswith("table.") else HIRA.of(name)].detach())
    for one, two in drawn.values():
        a, b = torch.stack(one), torch.stack(two)
        assert bool(a.any()) == bool(b.any())
        if a.any():
            assert float(a.std() / b.std()) == pytest.approx(1, abs=0.1)
            spread = [float(t.abs().max() / t.std()) for t in (a, b)]
            assert (spread[0] < 2) == (spread[1] < 2), "one is uniform, the other normal"


@pytest.mark.slow
def test_ranks_by_module_are_refused() -> None:
    """Peft has a field for them but does not use it, so neither a config nor a folder may have them."""
    peft = pytest.importorskip("peft")
    config = peft_config("HiraConfig", r=4, target_modules=["q_proj", "v_proj"], rank_pattern={"v_proj": 2})
    theirs = every_tensor(peft.get_peft_model(copy.deepcopy(tiny("llama", layers=1)), config))
    assert {tensor.shape[0] for name, tensor in theirs.items() if "hira_A" in name} == {4}
    with pytest.raises(GraftError, match="rank_pattern") as caught:
        graftc.compile(config, tiny("llama", layers=1))
    assert caught.value.code == "GC112"


@pytest.mark.slow
def test_groups_are_refused(tmp_path: Path) -> None:
    """Peft has no HiRA for convolutions with groups, so nothing is written."""
    model, x = nn.Conv1d(4, 6, 3, groups=2), torch.randn(2, 4, 7)
    spec = {"adapt": [{"method": "hira", "rank": 2, "target": {"modules": "0"}}]}
    compiled = graftc.compile(spec, nn.Sequential(model), {"input": x})
    check_nothing_is_written(compiled, tmp_path, "a Conv1d with groups")


@pytest.mark.full
def test_a_config_starts_as_its_fields_say() -> None:
    """A config becomes a spec with its rank, dropout and initialiser."""
    config = peft_config("HiraConfig", r=6, target_modules=["q_proj"], hira_dropout=0.2, init_weights="gaussian")
    (spec,) = runner_of(graftc.compile(config, tiny("llama"))).spec.adapt
    assert (spec.method, spec.rank, spec.dropout, spec.init) == ("hira", 6, 0.2, "gaussian")
