"""The compiled model under the transformers Trainer: train, evaluate, checkpoints, best model, resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import graftc
from graftc.testing import families
from tests.parity.support import Case, Names, pair
from tests.runtime.training.trainers import Run, check_checkpoint, interrupted


def examples(count: int = 48) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    rows = []
    for _ in range(count):
        ids = torch.randint(3, 100, (8,), generator=generator)
        rows.append({"input_ids": ids, "attention_mask": torch.ones(8).long(), "labels": ids[0] % 3})
    return rows


def source() -> nn.Module:
    """Return the same model each time."""
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


@pytest.mark.slow
def test_it_trains_keeps_the_best_model_and_never_writes_the_base(tmp_path: Path) -> None:
    base = source().state_dict()
    run = trainer(tmp_path, 4, load_best_model_at_end=True)
    before = run.evaluate()["eval_loss"]
    run.train()
    assert run.evaluate()["eval_loss"] < before
    state = run.model.full_state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in base.items())
    assert run.model.merge().certificate.passed


@pytest.mark.full
def test_a_resumed_run_ends_where_an_uninterrupted_one_does(tmp_path: Path) -> None:
    whole = trainer(tmp_path / "whole", 3)
    whole.train()
    steps = 48 // 8
    resumed = trainer(tmp_path / "resumed", 3)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{steps}"))
    expected = whole.model.adapter_state_dict()
    assert all(torch.equal(t, expected[n]) for n, t in resumed.model.adapter_state_dict().items())


@pytest.mark.full
def test_an_interrupted_run_in_16_bits_ends_where_an_uninterrupted_one_does(tmp_path: Path) -> None:
    """The run has accumulation, recomputed layers and the best model, and no checkpoint contains the base.

    `tests/gates` has 60 steps of a real model.
    """
    run = Run(lambda: trainer(tmp_path, 1).model, examples(), 6, {"bf16": True})
    outcome = interrupted(run, tmp_path)
    assert outcome.differences() == 0
    for folder in outcome.last:
        assert check_checkpoint(folder, outcome.whole.model, source()) < 100_000


@pytest.mark.slow
def test_what_a_trainer_saves_is_taken_for_no_plain_model(tmp_path: Path) -> None:
    from transformers import AutoModel, AutoModelForSequenceClassification

    run = trainer(tmp_path / "run", 1)
    run.save_model(str(tmp_path / "saved"))
    assert check_checkpoint(tmp_path / "saved", run.model, source()) < 100_000
    run.model.config.save_pretrained(tmp_path / "saved")
    for loader in (AutoModel, AutoModelForSequenceClassification):
        with pytest.raises(RuntimeError, match="mismatch"):
            loader.from_pretrained(tmp_path / "saved")


def texts(count: int = 24) -> list[dict[str, torch.Tensor]]:
    """Return texts of different lengths."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(3, 12, (count,), generator=generator).tolist()
    return [{"input_ids": torch.randint(3, 100, (n,), generator=generator)} for n in lengths]


def padded(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    ids = torch.nn.utils.rnn.pad_sequence([row["input_ids"] for row in rows], batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row["input_ids"]) for row in rows], batch_first=True)
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


@pytest.mark.full
def test_accumulated_batches_are_one_batch(tmp_path: Path) -> None:
    """2 x 4 and 8 x 1 give the same tensors, here and in peft, for a causal model with padding."""
    case = Case(
        "llama",
        {"method": "lora", "rank": 2, "alpha": 4, "target": {"modules": ["**.q_proj", "**.v_proj"]}},
        lambda peft: peft.LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"]),
        Names({"A": "lora_A.default.weight", "B": "lora_B.default.weight"}),
    )
    results: dict[str, list[torch.Tensor]] = {}
    for size in (2, 8):
        both = pair(case)
        names = list(both.tensors)
        for who, model in (("ours", both.ours), ("theirs", both.theirs)):
            settings = {
                "per_device_train_batch_size": size,
                "gradient_accumulation_steps": 8 // size,
                "optim": "sgd",
                "learning_rate": 0.5,
                "lr_scheduler_type": "constant",
                "bf16": False,
                "activation_checkpointing": False,
                "save_strategy": "no",
                "eval_strategy": "no",
                "load_best_model_at_end": False,
            }
            run = Run(lambda model=model: model, texts(), 3, settings, padded).trainer(tmp_path)  # type: ignore[misc]
            assert run.model_accepts_loss_kwargs and run._loss_shifts_labels
            before = {n: t.detach().clone() for n, t in model.named_parameters() if t.requires_grad}
            run.train()
            assert all(not torch.equal(t, before[n]) for n, t in model.named_parameters() if t.requires_grad)
            own = dict(both.ours.named_parameters())
            tensors = [own[n] if who == "ours" else both.tensors[n] for n in names]
            results[f"{who} {size}"] = [tensor.detach().clone() for tensor in tensors]
            if who == "ours":
                assert len(model.compilation.signatures) == 2, "the number of items is not a constant of a graph"
    for other in ("ours 2", "theirs 8", "theirs 2"):
        for one, two in zip(results["ours 8"], results[other], strict=True):
            assert float((one - two.reshape(one.shape)).norm() / one.norm()) < 1e-5, other
