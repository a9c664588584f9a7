"""Adapters start from the seed that was set if none is given, and the seed that was used is kept."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn

import graftc
from graftc.runtime.seeds import seed_everything
from graftc.testing.families import tiny
from tests.runtime.processes import together

SPECS: dict[str, dict[str, Any]] = {
    "lora": {"method": "lora", "rank": 3, "target": {"role": ["attn.q"]}},
    "vera": {"method": "vera", "rank": 3, "target": {"role": ["attn.q"]}},
    "prefix": {"method": "prefix", "length": 3},
    "houlsby": {"method": "houlsby", "bottleneck": 5},
}


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return tiny("bert")


def started(name: str, model: nn.Module, **more: Any) -> tuple[dict[str, Tensor], int]:
    compiled: Any = graftc.compile({"adapt": [SPECS[name]]}, model, **more)
    return compiled.adapter_state_dict(), compiled.compilation.seed


def same(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    assert one.keys() == two.keys()
    return all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.slow
@pytest.mark.sample("torch-prefix", "transformers-lora")
@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("way", ["torch", "transformers"])
def test_the_seed_that_was_set_decides(way: str, name: str, model: nn.Module) -> None:
    from transformers import set_seed

    choose = torch.manual_seed if way == "torch" else set_seed
    results = []
    for seed in (7, 8, 7):
        choose(seed)
        torch.rand(3)  # later draws do not matter
        results.append(started(name, model))
    assert [seed for _, seed in results] == [7, 8, 7]
    assert same(results[0][0], results[2][0]) and not same(results[0][0], results[1][0])
    torch.manual_seed(1)
    assert same(started(name, model, seed=7)[0], results[0][0])


@pytest.mark.slow
def test_nothing_is_drawn(model: nn.Module) -> None:
    torch.manual_seed(11)
    torch.rand(5)
    before = torch.get_rng_state(), random.getstate()
    started("lora", model)
    started("lora", model, cache=False)
    assert torch.equal(before[0], torch.get_rng_state()) and before[1] == random.getstate()
    assert torch.initial_seed() == 11


@pytest.mark.slow
@pytest.mark.parametrize("seed", [-5, 2**63, 0])
def test_every_seed_of_torch_may_be_kept(seed: int, model: nn.Module, tmp_path: Path) -> None:
    torch.manual_seed(seed)
    compiled: Any = graftc.compile({"adapt": [SPECS["lora"]]}, model)
    assert compiled.compilation.seed == torch.initial_seed()
    compiled.save(tmp_path / "artifact", certify=False)
    torch.manual_seed(99)
    loaded: Any = graftc.load(tmp_path / "artifact", model)
    assert loaded.compilation.seed == compiled.compilation.seed
    assert same(loaded.adapter_state_dict(), compiled.adapter_state_dict())


@pytest.mark.slow
def test_what_is_added_starts_from_the_seed_that_was_used(model: nn.Module) -> None:
    results = []
    for later in (1, 2):
        torch.manual_seed(7)
        compiled: Any = graftc.compile({"adapt": [SPECS["lora"]]}, model)
        torch.manual_seed(later)
        compiled.add({**SPECS["houlsby"], "name": "more"})
        results.append(compiled.adapter_state_dict())
    assert same(*results)


class StoppedError(Exception):
    """Raised to end a run as if it was killed."""


@pytest.mark.slow
def test_tune_goes_on_with_the_seed_that_it_began_with(model: nn.Module, tmp_path: Path) -> None:
    starts: list[dict[str, Tensor]] = []

    def train(compiled: Any, stage: Any) -> None:
        starts.append({name: tensor.clone() for name, tensor in compiled.adapter_state_dict().items()})
        if len(starts) == 1:
            raise StoppedError

    torch.manual_seed(7)
    with pytest.raises(StoppedError):
        graftc.tune({"adapt": [SPECS["lora"]]}, model, train, folder=tmp_path / "recipe")
    torch.manual_seed(8)
    result: Any = graftc.tune({"adapt": [SPECS["lora"]]}, model, train, folder=tmp_path / "recipe")
    assert same(*starts) and result.compilation.seed == 7
    torch.manual_seed(8)
    other: Any = graftc.tune({"adapt": [SPECS["lora"]]}, model, train)
    assert other.compilation.seed == 8 and not same(starts[0], starts[2])


def start_apart(rank: int, processes: int, folder: Path) -> None:
    """Compile in ranks that have different seeds."""
    torch.manual_seed(20 + rank)
    state = torch.get_rng_state()
    values, seed = started("lora", tiny("bert"))
    assert seed != 20 + rank or rank == 0
    torch.manual_seed(20 + rank)
    values, seed = started("lora", tiny("bert"))
    torch.save({"values": values, "seed": seed}, folder / f"{rank}.pt")
    torch.manual_seed(20 + rank)
    assert torch.equal(state, torch.get_rng_state())
    assert started("lora", tiny("bert"), seed=20 + rank)[1] == 20 + rank


@pytest.mark.full
def test_all_ranks_start_from_the_seed_of_the_first(tmp_path: Path) -> None:
    together("tests.runtime.test_seeds:start_apart", 2, tmp_path)
    one, two = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert one["seed"] == two["seed"] and same(one["values"], two["values"])


IMPORTS = """
import sys
import torch, transformers
before = set(sys.modules)
from graftc.runtime.seeds import seed_everything
seed_everything(5)
new = {name.partition(".")[0] for name in set(sys.modules) - before}
assert not new & {"peft", "bitsandbytes", "accelerate", "trl"}, new
"""


@pytest.mark.full
def test_seeding_imports_no_other_library() -> None:
    subprocess.run([sys.executable, "-c", IMPORTS], check=True)


@pytest.mark.parametrize("seed", [0, 5, 2**32 - 1])
def test_seeding_is_that_of_transformers(seed: int) -> None:
    from transformers import set_seed

    drawn = []
    for choose in (seed_everything, set_seed):
        choose(seed)
        drawn.append((random.random(), numpy.random.rand(), torch.rand(1).item()))
    assert drawn[0] == drawn[1]
