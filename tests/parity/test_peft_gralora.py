"""GraLoRA compared with the installed peft in float64: outputs, gradients, steps and merged outputs."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graftc
from graftc.runtime.model.runner import runner_of
from graftc.testing.families import tiny
from tests.kit.comparing import every_tensor
from tests.kit.releases import peft_config
from tests.parity.support import MODULES, Case, Names, check_float64, check_nothing_is_written, globs

GRALORA = Names(
    {"A": "gralora_A.default", "B": "gralora_B.default"}
    | {f"{part}_hybrid": f"gralora_{part}_general.default.weight" for part in "AB"}
)
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "hybrid": ({"k": 4, "hybrid_rank": 3}, {"gralora_k": 4, "hybrid_r": 3}),
    "one": ({"k": 1}, {"gralora_k": 1}),
}


@pytest.mark.slow
@pytest.mark.sample("hybrid-llama")
@pytest.mark.parametrize("family", MODULES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_layers(variant: str, family: str) -> None:
    modules, (ours, theirs) = MODULES[family], VARIANTS[variant]
    adaptation = {"method": "gralora", "target": globs(modules), "rank": 4, "alpha": 6, **ours}
    fields = {"r": 4, "alpha": 6, "target_modules": modules, "fan_in_fan_out": family == "gpt2", **theirs}
    check_float64(Case(family, adaptation, lambda _: peft_config("GraloraConfig", **fields), GRALORA))


@pytest.mark.full
@pytest.mark.parametrize("start", [True, False])
def test_a_config_starts_as_in_peft(start: bool) -> None:
    """A config becomes a spec with its values, whose tensors have peft's bounds and zeros."""
    peft = pytest.importorskip("peft")
    fields = {"r": 8, "hybrid_r": 2, "gralora_k": 4, "alpha": 5, "gralora_dropout": 0.2, "init_weights": start}
    config = peft_config("GraloraConfig", target_modules=["q_proj", "down_proj"], **fields)
    compiled = graftc.compile(config, tiny("llama"))
    (spec,) = runner_of(compiled).spec.adapt
    assert (spec.rank, spec.hybrid_rank, spec.k, spec.alpha, spec.dropout) == (8, 2, 4, 5, 0.2)
    theirs = every_tensor(peft.get_peft_model(copy.deepcopy(tiny("llama")), config))
    groups: dict[tuple[str, tuple[int, ...]], tuple[list[Tensor], list[Tensor]]] = {}
    for name, tensor in compiled.adapter_state_dict().items():
        pair = groups.setdefault((name.rpartition(".")[2], tuple(tensor.shape)), ([], []))
        pair[0].append(tensor)
        pair[1].append(theirs[GRALORA.of(name)].detach())
    for one, two in groups.values():
        a, b = torch.stack(one), torch.stack(two)
        assert a.shape == b.shape and bool(a.any()) == bool(b.any())
        assert float(a.abs().max()) == pytest.approx(float(b.abs().max()), rel=0.1)


@pytest.mark.slow
def test_convolutions_are_refused(tmp_path: Path) -> None:
    """Peft has GraLoRA for linear layers only, so nothing is written."""
    model, x = nn.Sequential(nn.Conv1d(4, 6, 3)), torch.randn(2, 4, 7)
    spec = {"adapt": [{"method": "gralora", "rank": 2, "target": {"modules": "0"}}]}
    compiled = graftc.compile(spec, model, {"input": x})
    check_nothing_is_written(compiled, tmp_path, "a Conv1d")
