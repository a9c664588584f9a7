"""Objectives that compare passes, under the transformers Trainer, which needs no change for them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from graftc.specs.errors.diagnostics import GraftWarning
from graftc.testing import same_bits
from tests.kit.refusals import no_warning
from tests.kit.training import labelled_texts, trainer_in_order
from tests.runtime.training.test_repeated import SETTINGS, doubled, like


def trainer(folder: Path, compiled: Any, data: Sequence[Any], *, callback: bool = True, **changes: Any) -> Any:
    """Return a Trainer with the data in order, plain SGD and a constant learning rate."""
    plain = {"num_train_epochs": 1, "per_device_train_batch_size": 4, "learning_rate": 0.05}
    settings = {**plain, "optim": "sgd", "max_grad_norm": 0, **changes}
    return trainer_in_order(folder, compiled, data, callback=callback, **settings)


def noted_states(run: Any) -> list[Tensor]:
    """Return a list that records torch's generator at each micro-batch; the Trainer draws between them as well."""
    states: list[Tensor] = []
    original = run.training_step

    def step(*args: Any, **kwargs: Any) -> Any:
        states.append(torch.get_rng_state())
        return original(*args, **kwargs)

    run.training_step = step
    return states


@pytest.mark.full
@pytest.mark.parametrize("callback", [True, False])
@pytest.mark.parametrize("steps", [1, 2])
def test_the_trainer_has_the_term(callback: bool, steps: int, tmp_path: Path) -> None:
    """With and without callback and accumulation, the values are, bit for bit, those of a loop by hand."""
    compiled = doubled(SETTINGS["alike"])
    other = like(compiled, SETTINGS["alike"])
    data = labelled_texts(16)
    with no_warning():
        run = trainer(tmp_path, compiled, data, callback=callback, gradient_accumulation_steps=steps)
        states = noted_states(run)
        run.train()
    assert len(states) == 4
    optimiser = torch.optim.SGD([p for p in other.parameters() if p.requires_grad], lr=0.05)
    for number, start in enumerate(range(0, len(data), 4), start=1):
        torch.set_rng_state(states[number - 1])
        batch = {name: torch.stack([e[name] for e in data[start : start + 4]]) for name in data[0]}
        (other(**batch).loss / steps).backward()
        if number % steps == 0:
            optimiser.step()
            optimiser.zero_grad()
    assert same_bits(list(compiled.adapter_state_dict().values()), list(other.adapter_state_dict().values()))


@pytest.mark.full
def test_a_trainer_that_computes_the_loss_itself(tmp_path: Path) -> None:
    """Label smoothing takes the labels away from the model: the term is missed, and a warning says so."""
    compiled = doubled(SETTINGS["alike"])
    run = trainer(tmp_path, compiled, labelled_texts(8), label_smoothing_factor=0.1)
    with pytest.warns(GraftWarning, match="GC025"):
        run.train()


@pytest.mark.full
def test_a_resumed_run_ends_where_an_uninterrupted_one_does(tmp_path: Path) -> None:
    """Runs end the same, bit for bit: routes and masks come from torch's generator, which the Trainer keeps."""
    settings = {"save_strategy": "steps", "save_steps": 3, "num_train_epochs": 2, "optim": "adamw_torch"}
    whole = trainer(tmp_path / "whole", doubled(SETTINGS["alike"], dropout=0.1), labelled_texts(16), **settings)
    whole.train()
    again = trainer(tmp_path / "again", doubled(SETTINGS["alike"], dropout=0.1), labelled_texts(16), **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    results = [list(run.model.adapter_state_dict().values()) for run in (whole, again)]
    assert same_bits(*results)
