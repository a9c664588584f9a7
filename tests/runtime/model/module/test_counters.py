"""Tools that count operations: counts by operator are right, and counts by the class of modules cause a warning."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import graftc
from graftc.testing.families import tiny
from tests.kit.models import fresh

LORA = {"method": "lora", "rank": 2, "target": {"role": ["attn.q", "attn.v"]}}

pytestmark = pytest.mark.slow
IDS = torch.randint(5, 50, (2, 7), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module", params=["llama", "bert", "gpt2"])
def adapted_model(request: pytest.FixtureRequest) -> Any:
    return fresh(request.param, LORA)


def counted_by_modules(model: nn.Module, kinds: dict[type, Any]) -> float:
    """Count as thop's `profile` does: with a buffer for each module, and a hook on each module of a known class."""
    handles, before = [], model.training

    def begin(module: nn.Module) -> None:
        module.register_buffer("total_ops", torch.zeros(1, dtype=torch.float64))
        if type(module) in kinds:
            handles.append(module.register_forward_hook(kinds[type(module)]))

    model.eval()
    model.apply(begin)
    with torch.no_grad():
        model(IDS)
    total = sum(float(module.total_ops) for module in model.modules())
    for handle in handles:
        handle.remove()
    for module in model.modules():
        module._buffers.pop("total_ops", None)
    model.train(before)
    return total


def linear(module: nn.Linear, inputs: tuple[Any, ...], output: Any) -> None:
    module.total_ops += output.numel() * module.in_features


@pytest.mark.sample("llama")
def test_a_count_by_modules_is_warned_of(adapted_model: Any) -> None:
    tensors = list(adapted_model.state_dict())
    assert counted_by_modules(copy.deepcopy(adapted_model.compilation.model), {nn.Linear: linear}) > 0
    with pytest.warns(graftc.GraftWarning, match="total_ops of .* FlopCounterMode|GC076"):
        count = counted_by_modules(adapted_model, {nn.Linear: linear})
    assert count == 0 and list(adapted_model.state_dict()) == tensors


@pytest.mark.sample("llama")
def test_operators_are_counted(adapted_model: Any) -> None:
    with adapted_model.disabled(), FlopCounterMode(display=False) as ours:
        adapted_model(IDS)
    with FlopCounterMode(display=False) as theirs:
        adapted_model.compilation.model(IDS)
    # Before transformers 5.15, the angles of rotary positions are a product of matrices, which graphs compute entry by
    # entry (`graftc.compat.autocast`): per position, one multiplication and one addition for each pair of a head.
    angles = IDS.shape[1] * getattr(adapted_model.config, "head_dim", 0)
    assert theirs.get_total_flops() - ours.get_total_flops() in (0, angles) and ours.get_total_flops() > 0
    with warnings.catch_warnings():
        warnings.simplefilter("error", graftc.GraftWarning)
        with FlopCounterMode(display=False) as adapted:
            adapted_model(IDS)
    assert adapted.get_total_flops() > theirs.get_total_flops()


def test_a_compiled_model_may_have_a_buffer_of_its_user() -> None:
    model = graftc.compile({"adapt": [LORA]}, tiny("bert"))
    with warnings.catch_warnings():
        warnings.simplefilter("error", graftc.GraftWarning)
        model.register_buffer("steps", torch.zeros(1))
    assert model.get_buffer("steps").shape == (1,)
