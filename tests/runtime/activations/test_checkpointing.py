"""Activation checkpointing, switched on as by the transformers Trainer."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import graftc
from graftc.specs.errors.diagnostics import GraftError
from tests.kit.comparing import gradients_of
from tests.kit.models import adapted

SPEC: dict[str, Any] = {"adapt": [{"method": "lora", "rank": 2, "dropout": 0.3, "target": {"role": "attn.q"}}]}


@pytest.fixture(scope="module")
def gpt2() -> Any:
    return adapted("gpt2", **SPEC).train()


def gradients(compiled: Any) -> list[torch.Tensor]:
    ids = torch.arange(5, 19).reshape(2, 7)
    torch.manual_seed(3)
    compiled.zero_grad()
    compiled(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.square().mean().backward()
    return list(gradients_of(compiled).values())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["activation_checkpointing", "gradient_checkpointing"])
@pytest.mark.parametrize("options", [None, {"use_reentrant": False, "preserve_rng_state": True, "early_stop": False}])
@pytest.mark.parametrize(("every", "offload", "expected"), [(1, False, [1, 1]), (2, True, [1, 0]), (5, False, [1, 0])])
def test_gradients_are_the_same_to_the_bit(
    gpt2: Any, name: str, options: Any, every: int, offload: bool, expected: list[int]
) -> None:
    before = gradients(gpt2)
    enable, disable = getattr(gpt2, f"{name}_enable"), getattr(gpt2, f"{name}_disable")
    enable(**{f"{name}_kwargs": options}, every_n_layers=every, offload=offload)
    assert [block._graftc.checkpointing for block in gpt2.blocks.values()] == list(map(bool, expected))
    assert gpt2.is_activation_checkpointing and gpt2.is_gradient_checkpointing
    after = gradients(gpt2)
    disable()
    assert not gpt2.is_activation_checkpointing and not any(b._graftc.checkpointing for b in gpt2.blocks.values())
    assert before and all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("called", ["activation", "gradient"])
@pytest.mark.parametrize("wrapped", ["activation", "gradient"])
def test_a_wrapper_around_either_name_stays_in_effect(gpt2: Any, called: str, wrapped: str) -> None:
    name, calls = f"{wrapped}_checkpointing_enable", 0
    original = getattr(gpt2, name)

    def wrapper(options: Any = None, **others: Any) -> None:
        nonlocal calls
        calls += 1
        original({"early_stop": False}, **others)

    setattr(gpt2, name, wrapper)
    try:
        getattr(gpt2, f"{called}_checkpointing_enable")()
    finally:
        delattr(gpt2, name)
    assert calls == 1
    assert [dict(block._graftc.recompute.options) for block in gpt2.blocks.values()] == [{"early_stop": False}] * 2
    gpt2.activation_checkpointing_disable()


def test_layers_are_computed_again(gpt2: Any) -> None:
    """Less is kept for the backward pass, and layers that are left out of checkpointing keep their values."""
    sizes = []
    for every in (None, 1, 2):
        if every is not None:
            gpt2.activation_checkpointing_enable(every_n_layers=every)
        kept = 0

        def count(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal kept
            kept += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            gpt2(input_ids=torch.arange(5, 19).reshape(2, 7), attention_mask=torch.ones(2, 7).long())
        sizes.append(kept)
    gpt2.activation_checkpointing_disable()
    assert sizes[1] < sizes[2] < sizes[0]


@pytest.mark.parametrize(
    "call",
    [
        {"activation_checkpointing_kwargs": {"use_reentrant": True}},
        {"activation_checkpointing_kwargs": {"use_reentrent": False}},
        {"activation_checkpointing_kwargs": {"every": 2}},
        {"every_n_layers": 0},
        {"every_n_layers": True},
        {"every_n_layers": 1.5},
        {"every_n_layers": "2"},
    ],
    ids=str,
)
def test_what_cannot_be_done_is_refused_by_code(gpt2: Any, call: dict[str, Any]) -> None:
    with pytest.raises(GraftError) as caught:
        gpt2.activation_checkpointing_enable(**call)
    assert caught.value.code == "GC072" and caught.value.hint
    assert not gpt2.is_activation_checkpointing


def test_a_model_without_layers(gpt2: Any) -> None:
    spec = {"adapt": [{"method": "lora", "rank": 2, "target": {"modules": "0"}}]}
    flat = graftc.compile(spec, torch.nn.Sequential(torch.nn.Linear(4, 4)), (torch.ones(2, 4),))
    with pytest.raises(GraftError, match="GC034"):
        flat.activation_checkpointing_enable(None, 1, False)
