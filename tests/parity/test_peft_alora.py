"""aLoRA compared with the installed peft: losses, gradients and generated text, wherever rows have the invocation."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from graftc.testing import largest_difference, outputs_of
from graftc.testing.families import tiny
from tests.parity.support import MODULES, Case, Names, Pair, globs, pair

INVOCATION, PAD = [7, 9], 0
ROWS = {
    "twice": [3, 7, 9, 4, 7, 9, 5, 6],
    "first": [7, 9, 4, 5, 6, 8, 11, 12],
    "last": [11, 4, 5, 6, 12, 13, 7, 9],
    "none": [9, 7, 4, 7, 5, 9, 6, 7],
    "left": [PAD, PAD, PAD, 4, 7, 9, 5, 8],
    "right": [4, 7, 9, 5, 8, PAD, PAD, PAD],
    "half": [3, 4, 7, 9, 5, 6, 8, 7],
}
"""Rows with the invocation at different places, with padding on either side, and with a half of it at the end."""


def case(family: str, invocation: list[int], **fields: Any) -> Case:
    """aLoRA of rank 4 on the modules in `MODULES`."""
    modules = MODULES[family]
    adaptation = {"method": "alora", "invocation": invocation, "target": globs(modules), "rank": 4, "alpha": 6}
    own = {"fan_in_fan_out": family == "gpt2", "use_rslora": fields.get("rslora", False), "task_type": "CAUSAL_LM"}
    return Case(
        family,
        {**adaptation, **fields},
        lambda p: p.LoraConfig(r=4, lora_alpha=6, target_modules=modules, alora_invocation_tokens=invocation, **own),
        Names({"A": "lora_A.default.weight", "B": "lora_B.default.weight"}),
    )


def batch() -> dict[str, Tensor]:
    ids = torch.tensor(list(ROWS.values()))
    mask = (ids != PAD).long()
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def worst_gradient(models: Pair) -> float:
    """Return the largest difference of losses and of gradients, relative to the largest gradient of each tensor."""
    losses = []
    for model in (models.ours, models.theirs):
        model.zero_grad()
        loss = model(**batch()).loss
        loss.backward()
        losses.append(float(loss))
    mine = dict(models.ours.named_parameters())
    worst = abs(losses[0] - losses[1])
    for name, other in models.tensors.items():
        own = mine[name].grad
        assert own is not None and other.grad is not None and bool(own.any()), name
        worst = max(worst, float((own - other.grad).abs().max() / own.abs().max()))
    return worst


@pytest.mark.sample("llama-invocation0")
@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "invocation"),
    [("llama", INVOCATION), ("llama", [7]), ("gpt2", [4, 7, 9, 5]), ("gpt_neox", INVOCATION)],
)
def test_losses_and_gradients(family: str, invocation: list[int]) -> None:
    models = pair(case(family, invocation, rslora=len(invocation) == 1))
    if family != "gpt2":  # its config has dropout
        models.ours.train()
        models.theirs.train()
    assert worst_gradient(models) <= 1e-5
    assert largest_difference(outputs_of(models.ours, batch()), outputs_of(models.theirs, batch())) <= 1e-5


@pytest.mark.slow
def test_rows_of_the_batch_do_not_matter_to_each_other() -> None:
    """Each row alone gives what it gives in the batch, and only the row without the invocation equals the base's."""
    models = pair(case("llama", INVOCATION))
    inputs = {name: batch()[name] for name in ("input_ids", "attention_mask")}
    (ours,), (base,) = outputs_of(models.ours, inputs), outputs_of(models.base, inputs)
    for number, name in enumerate(ROWS):
        row = {key: value[number : number + 1] for key, value in inputs.items()}
        (alone,) = outputs_of(models.ours, row)
        assert largest_difference([alone[0]], [ours[number]]) <= 1e-5
        assert torch.equal(ours[number], base[number]) == (name == "none")


@pytest.mark.full
def test_generated_text() -> None:
    """Prompts that are padded on the left are continued with the same tokens, with a cache and without one.

    Without a cache, peft counts from the end of a text that grows, so it is compared with a cache only.
    """
    models = pair(case("llama", INVOCATION))
    ids = torch.tensor([ROWS[name] for name in ("twice", "first", "none", "left", "half")])
    prompt = {"input_ids": ids, "attention_mask": (ids != PAD).long()}
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": PAD}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = models.theirs.generate(**prompt, **options)  # type: ignore[operator]
    ours = models.ours.generate(**prompt, **options)
    assert torch.equal(ours, theirs)
    assert torch.equal(ours, models.ours.generate(**prompt, **options, use_cache=False))
    base: Any = copy.deepcopy(tiny("llama")).eval()
    assert not torch.equal(ours, base.generate(**prompt, **options))
