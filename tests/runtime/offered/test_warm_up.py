"""Calls of a model that was warmed up find their graphs, their code and their plans already made."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import graftc
from graftc.compiler import signatures
from graftc.passes.core import progress
from graftc.runtime.activations.training_code import TrainingCode
from graftc.specs.errors.diagnostics import GraftError
from graftc.testing import families
from graftc.testing.families import tiny

SPEC: dict[str, Any] = {"adapt": [{"method": "lora", "rank": 2, "target": {"role": "attn.q"}}]}
IDS = torch.tensor([[5, 9, 23, 7, 11, 3], [8, 2, 4, 6, 10, 12]])
BATCH = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "labels": IDS}


@pytest.fixture
def made_in_calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of what is made during calls: signatures, and plans of training steps."""
    names: list[str] = []

    def noted(owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            names.append(name)
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, call)

    noted(signatures, "adapt_signature")
    noted(TrainingCode, "choose")
    return names


@pytest.mark.slow
def test_nothing_is_left_for_the_first_calls(made_in_calls: list[str]) -> None:
    compiled = graftc.compile(SPEC, tiny("llama")).train()
    before = {name: value.clone() for name, value in compiled.state_dict().items()}
    random, modes = torch.get_rng_state(), [module.training for module in compiled.modules()]
    compiled.warm_up(BATCH, generate=True)
    assert {"adapt_signature", "choose"} <= set(made_in_calls)
    assert torch.equal(torch.get_rng_state(), random)
    assert [module.training for module in compiled.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in compiled.state_dict().items())
    assert all(parameter.grad is None for parameter in compiled.parameters())
    made_in_calls.clear()
    compiled(**BATCH).loss.backward()
    compiled.eval()
    with torch.no_grad():
        compiled(**BATCH)
        compiled.generate(IDS, attention_mask=BATCH["attention_mask"], max_new_tokens=3, do_sample=False)
    assert made_in_calls == []


@pytest.mark.full
def test_it_changes_no_result() -> None:
    source = families.gpt2()
    warm, cold = (graftc.compile(SPEC, source).train() for _ in range(2))
    warm.warm_up(BATCH)
    outputs = []
    for compiled in (warm, cold):
        torch.manual_seed(1)
        outputs.append(compiled(**BATCH).loss)
        outputs[-1].backward()
    assert torch.equal(*outputs)
    pairs = zip(warm.parameters(), cold.parameters(), strict=True)
    assert all(torch.equal(a.grad, b.grad) for a, b in pairs if a.grad is not None and b.grad is not None)


@pytest.mark.slow
def test_a_model_in_eval_mode_is_made_ready_for_that(made_in_calls: list[str]) -> None:
    compiled = graftc.compile(SPEC, tiny("bert")).eval()
    compiled.warm_up({"input_ids": IDS, "attention_mask": torch.ones_like(IDS)})
    assert "choose" not in made_in_calls
    made_in_calls.clear()
    compiled(IDS, attention_mask=torch.ones_like(IDS))
    assert made_in_calls == []


@pytest.mark.slow
def test_work_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[str] = []
    monkeypatch.setattr(progress, "AFTER", 0.0)
    monkeypatch.setattr(progress, "EVERY", 0.001)
    compiled = graftc.compile(SPEC, tiny("llama")).train()
    with progress.listening(lambda step, seconds: steps.append(step)):
        compiled.warm_up(BATCH)
    assert any(step.startswith("anchor") for step in steps), steps


@pytest.mark.slow
@pytest.mark.parametrize(("batch", "generate"), [(IDS, False), ({"inputs_embeds": torch.zeros(1, 2, 48)}, True)])
def test_what_is_no_batch_is_refused(batch: Any, generate: bool) -> None:
    compiled = graftc.compile(SPEC, tiny("llama")).eval()
    with pytest.raises(GraftError) as error:
        compiled.warm_up(batch, generate=generate)
    assert error.value.code == "GC073"
