"""The compiled model under the transformers Trainer: train, evaluate, checkpoints, best model, resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import graftc
from tests import families

pytestmark = pytest.mark.slow


def examples(count: int = 48) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(count):
        ids = torch.randint(3, 100, (8,), generator=generator)
        found.append({"input_ids": ids, "attention_mask": torch.ones(8).long(), "labels": ids[0] % 3})
    return found


def source() -> nn.Module:
    """The same model each time."""
    torch.manual_seed(11)
    return families.bert()


def trainer(folder: Path, epochs: int, **changes: Any) -> Any:
    from transformers import Trainer, TrainingArguments

    spec = {
        "adapt": [{"method": "lora", "target": {"role": ["attn.q", "attn.v"]}, "dropout": 0.1}],
        "train": ["classifier"],
        "checkpoint": "layers",
    }
    adapted = graftc.compile(spec, source())
    arguments = TrainingArguments(
        str(folder),
        num_train_epochs=epochs,
        per_device_train_batch_size=8,
        learning_rate=5e-3,
        report_to=[],
        save_strategy="epoch",
        eval_strategy="epoch",
        disable_tqdm=True,
        use_cpu=True,
        seed=7,
        **changes,
    )
    data = examples()
    return Trainer(model=adapted, args=arguments, train_dataset=data, eval_dataset=data[:16])


def test_it_trains_keeps_the_best_model_and_never_writes_the_base(tmp_path: Path) -> None:
    base = source().state_dict()
    run = trainer(tmp_path, 4, load_best_model_at_end=True)
    before = run.evaluate()["eval_loss"]
    run.train()
    assert run.evaluate()["eval_loss"] < before
    state = run.model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in base.items())
    assert run.model.merge().certificate.passed


def test_a_resumed_run_ends_where_an_uninterrupted_one_does(tmp_path: Path) -> None:
    whole = trainer(tmp_path / "whole", 3)
    whole.train()
    steps = 48 // 8
    resumed = trainer(tmp_path / "resumed", 3)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{steps}"))
    expected = whole.model.adapter_state_dict()
    assert all(torch.equal(t, expected[n]) for n, t in resumed.model.adapter_state_dict().items())
