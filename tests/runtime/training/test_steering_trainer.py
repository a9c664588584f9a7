"""The callback under the transformers Trainer: once per optimiser step, like a plain loop, resumed bit for bit."""

from __future__ import annotations

import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from graftc.specs.errors.diagnostics import GraftWarning
from tests.kit.models import fresh, still
from tests.kit.training import labelled_texts, trainer_in_order

TARGET = {"role": ["attn.q", "ffn.down"]}
ADALORA = {"method": "adalora", "target": TARGET, "rank": 4, "target_rank": 2, "warmup_steps": 1, "final_steps": 2}
SORA = {"method": "sora", "target": TARGET, "rank": 4, "threshold": 0.02, "final_threshold": 0.05, "l1": 0.1}
DYLORA = {"method": "dylora", "target": TARGET, "rank": 4}
METHODS = {"adalora": ADALORA, "sora": SORA, "dylora": DYLORA}
BATCH, COUNT = 8, 32


def trainer(folder: Path, compiled: Any, *, steer: bool = True, **changes: Any) -> Any:
    """Return a Trainer with the data in order, AdamW by default, and a constant learning rate."""
    settings: dict[str, Any] = {"num_train_epochs": 2, "per_device_train_batch_size": BATCH, "learning_rate": 5e-3}
    settings |= {"optim": "adamw_torch", "weight_decay": 0.01, **changes}
    return trainer_in_order(folder, compiled, labelled_texts(COUNT), callback=steer, **settings)


def plain_loop(compiled: Any, like: Any, epochs: int = 2, clip: float = 1.0) -> None:
    """Train by hand as the Trainer does: with the optimiser that it makes, and the objective first."""
    optimiser = like.create_optimizer()
    data = labelled_texts(COUNT)
    compiled.begin(epochs * COUNT // BATCH)
    compiled.train()
    torch.manual_seed(7)
    for _ in range(epochs):
        for start in range(0, COUNT, BATCH):
            batch = {name: torch.stack([e[name] for e in data[start : start + BATCH]]) for name in data[0]}
            extra = compiled.extra_loss()
            if extra.requires_grad:
                extra.backward()
            compiled(**batch).loss.backward()
            torch.nn.utils.clip_grad_norm_(compiled.parameters(), clip)
            optimiser.step()
            compiled.after_step()
            optimiser.zero_grad()


@pytest.mark.full
@pytest.mark.parametrize("method", ["adalora", "sora"])
@pytest.mark.parametrize("clip", [1.0, 0.05])
def test_a_plain_loop_and_the_callback_give_the_same(method: str, clip: float, tmp_path: Path) -> None:
    """Tensors are equal bit for bit, also with clipped gradients, as objectives are clipped with the loss."""
    first, second = fresh(still("bert"), METHODS[method], seed=0), fresh(still("bert"), METHODS[method], seed=0)
    trainer(tmp_path / "a", first, max_grad_norm=clip).train()
    plain_loop(second, trainer(tmp_path / "b", second, max_grad_norm=clip), clip=clip)
    expected = first.adapter_state_dict()
    for name, tensor in second.adapter_state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    assert expected[f"graftc.{method}.step"].tolist() == [8]


@pytest.mark.full
@pytest.mark.parametrize("method", ["adalora", "sora"])
def test_accumulation_counts_once(method: str, tmp_path: Path) -> None:
    """Two half batches make one step: as many controller steps, one gradient of the objective, the same values."""
    whole, halves = fresh(still("bert"), METHODS[method], seed=0), fresh(still("bert"), METHODS[method], seed=0)
    trainer(tmp_path / "a", whole, optim="sgd").train()
    run = trainer(
        tmp_path / "b", halves, optim="sgd", per_device_train_batch_size=BATCH // 2, gradient_accumulation_steps=2
    )
    calls = count_objectives(halves)
    run.train()
    assert len(calls) == 8
    expected, start = whole.adapter_state_dict(), fresh(still("bert"), METHODS[method], seed=0).adapter_state_dict()
    for name, tensor in halves.adapter_state_dict().items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=1e-6, msg=name)
    assert any(not torch.allclose(tensor, start[name], atol=1e-3) for name, tensor in expected.items())
    assert halves.adapter_state_dict()[f"graftc.{method}.step"].tolist() == [8]


def count_objectives(compiled: Any) -> list[int]:
    """Return a list that grows with each use of the objectives."""
    calls: list[int] = []
    original = compiled.extra_loss

    def counted() -> Tensor:
        calls.append(1)
        result: Tensor = original()
        return result

    compiled._graftc.extra_loss = counted
    return calls


@pytest.mark.full
def test_the_gradient_of_an_objective_is_counted_once(tmp_path: Path) -> None:
    """With a loss of zero, the gradient after two micro-batches is that of the objective."""
    from transformers import Trainer, TrainerCallback

    compiled = fresh(still("bert"), {**ADALORA, "warmup_steps": 5, "final_steps": 0}, seed=0)
    compiled.extra_loss().backward()
    expected = {name: p.grad.clone() for name, p in compiled.named_parameters() if name.endswith((".A", ".B"))}
    compiled.zero_grad()
    seen: list[dict[str, Tensor]] = []

    class Look(TrainerCallback):
        def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
            seen.append({n: p.grad.clone() for n, p in compiled.named_parameters() if n in expected})

    run = trainer(tmp_path, compiled, optim="sgd", max_steps=10, gradient_accumulation_steps=2, max_grad_norm=0)
    run.add_callback(Look())
    run.compute_loss = lambda model, inputs, **_: 0.0 * Trainer.compute_loss(run, model, inputs)
    run.train()
    assert len(seen) == 10 and expected
    for name, gradient in expected.items():
        assert gradient.any() and torch.equal(seen[0][name], gradient)


@pytest.mark.full
@pytest.mark.parametrize("method", METHODS)
def test_a_resumed_run_ends_where_an_uninterrupted_one_does(method: str, tmp_path: Path) -> None:
    """Runs end the same, bit for bit, from checkpoints in the first and the third epoch, dropout and draws included."""
    entry = {**METHODS[method], "dropout": 0.1}
    settings = {"save_strategy": "steps", "save_steps": 3, "num_train_epochs": 3}
    whole = trainer(tmp_path / "whole", fresh("bert", entry, seed=0), **settings)
    whole.train()
    expected = whole.model.adapter_state_dict()
    for step in (3, 9):
        resumed = trainer(tmp_path / f"resumed{step}", fresh("bert", entry, seed=0), **settings)
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
        tensors = resumed.model.adapter_state_dict()
        assert tensors.keys() == expected.keys()
        for name, tensor in tensors.items():
            assert torch.equal(tensor, expected[name]), name


@pytest.mark.full
def test_a_second_training_goes_on_from_the_first(tmp_path: Path) -> None:
    """The schedule of a model that was trained before covers both trainings."""
    compiled = fresh(still("bert"), ADALORA, seed=0)
    trainer(tmp_path / "a", compiled, num_train_epochs=1).train()
    trainer(tmp_path / "b", compiled, num_train_epochs=2).train()
    (controller,) = compiled.steering.controllers.values()
    assert (controller.steps, controller.total) == (12, 12)


@pytest.mark.full
def test_a_training_without_the_callback_is_noticed(tmp_path: Path) -> None:
    """Merging the model warns with GC025."""
    compiled = fresh(still("bert"), SORA, seed=0)
    trainer(tmp_path, compiled, steer=False, num_train_epochs=1).train()
    with pytest.warns(GraftWarning, match="GC025"):
        compiled.merge()
    steered = fresh(still("bert"), SORA, seed=0)
    trainer(tmp_path / "b", steered, num_train_epochs=1).train()
    with warnings.catch_warnings():
        warnings.simplefilter("error", GraftWarning)
        steered.merge()


@pytest.mark.slow
def test_a_step_that_the_scaler_skips_is_no_step() -> None:
    """Controllers skip it, and the schedule still ends with the training; objectives are scaled."""
    compiled = fresh(still("bert"), ADALORA, seed=0)
    callback = compiled.callback()
    state = SimpleNamespace(max_steps=10, global_step=0)
    scaler = SimpleNamespace(scale=lambda loss: 8 * loss)
    optimizer = SimpleNamespace(step_was_skipped=True, scaler=scaler)
    callback.on_train_begin(None, state, None)
    compiled.extra_loss().backward()
    name = next(n for n, p in compiled.named_parameters() if n.endswith(".A"))
    plain = compiled.get_parameter(name).grad.clone()
    compiled.zero_grad()
    callback.on_step_begin(None, state, None, optimizer=optimizer)
    torch.testing.assert_close(compiled.get_parameter(name).grad, 8 * plain)
    callback.on_optimizer_step(None, state, None, optimizer=optimizer)
    (controller,) = compiled.steering.controllers.values()
    assert (controller.steps, controller.total) == (0, 9)
    optimizer.step_was_skipped = False
    state.global_step = 1
    callback.on_optimizer_step(None, state, None, optimizer=optimizer)
    assert (controller.steps, controller.total) == (1, 9)
