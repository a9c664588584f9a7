"""Runs of the transformers Trainer that are interrupted and resumed, and checks of their checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

import graftc

BESIDE = ("optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "training_args.bin")
"""Files of a checkpoint that are the trainer's own; tokenizers write others."""


class InterruptedRun(Exception):  # noqa: N818
    """Raised to end a run from outside."""


@dataclass(frozen=True)
class Run:
    """The settings of a training.

    Attributes:
        make: a function that makes the compiled model, the same each time.
        examples: texts with labels.
        steps: the number of optimiser steps; checkpoints are written at each third of them.
        changes: changed arguments of the trainer.
        collate: a function that makes a batch.
    """

    make: Callable[[], Any]
    examples: Sequence[dict[str, Tensor]]
    steps: int
    changes: dict[str, Any]
    collate: Any = None

    def trainer(self, folder: Path, stop: int | None = None) -> Any:
        """Return a trainer, which is interrupted after ``stop`` steps."""
        from transformers import Trainer, TrainerCallback, TrainingArguments

        class Stop(TrainerCallback):
            def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                if state.global_step == stop:
                    raise InterruptedRun

        settings: dict[str, Any] = {
            "max_steps": self.steps,
            "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": 4,
            "activation_checkpointing": True,
            "bf16": True,
            "learning_rate": 2e-3,
            "save_strategy": "steps",
            "eval_strategy": "steps",
            "save_steps": self.steps // 3,
            "eval_steps": self.steps // 3,
            "load_best_model_at_end": True,
            "report_to": [],
            "disable_tqdm": True,
            "use_cpu": True,
            "seed": 7,
        }
        return Trainer(
            model=self.make(),
            args=TrainingArguments(str(folder), **{**settings, **self.changes}),
            train_dataset=self.examples,
            eval_dataset=self.examples[:16],
            data_collator=self.collate,
            callbacks=[Stop()],
        )


@dataclass(frozen=True)
class Outcome:
    """Two runs with results that should be the same.

    Attributes:
        whole, resumed: the trainers after their runs.
        last: the folders of their last checkpoints.
    """

    whole: Any
    resumed: Any
    last: tuple[Path, Path]

    def differences(self) -> float:
        """Return the largest difference of any tensor, of the best models and of the last checkpoints."""
        pairs = [
            (self.whole.model.adapter_state_dict(), self.resumed.model.adapter_state_dict()),
            tuple(load_file(folder / "model.safetensors") for folder in self.last),
        ]
        largest = 0.0
        for one, two in pairs:
            assert one.keys() == two.keys()
            largest = max(
                [largest, *(float((t.double() - two[n].double()).abs().max()) for n, t in one.items() if t.numel())]
            )
        return largest


def interrupted(run: Run, folder: Path) -> Outcome:
    """Train in one go, and again with an interruption after the first checkpoint, where another trainer resumes."""
    whole = run.trainer(folder / "whole")
    whole.train()
    try:
        run.trainer(folder / "resumed", stop=run.steps // 3 + 1).train()
    except InterruptedRun:
        pass
    else:
        raise AssertionError("it was not interrupted")
    resumed = run.trainer(folder / "resumed")
    resumed.train(resume_from_checkpoint=True)
    last = f"checkpoint-{run.steps}"
    return Outcome(whole, resumed, (folder / "whole" / last, folder / "resumed" / last))


def check_checkpoint(folder: Path, compiled: Any, base: Any) -> int:
    """Check that a checkpoint contains adapters once and no base tensor, and that `graftc.load` reads it.

    Return the number of bytes beside the adapters that are not the trainer's.
    """
    tokenizer = [path for path in folder.iterdir() if path.name.startswith(("tokenizer", "special_tokens", "vocab"))]
    own = [path for path in folder.iterdir() if path.name not in BESIDE and path not in tokenizer]
    adapters = compiled.adapter_state_dict()
    tensors = load_file(folder / "model.safetensors")
    assert {name for name, tensor in tensors.items() if tensor.numel()} - {"_extra_state"} == adapters.keys()
    size = sum(t.numel() * t.element_size() for t in adapters.values())
    loaded: Any = graftc.load(folder, base)
    assert all(torch.equal(t, tensors[n]) for n, t in loaded.adapter_state_dict().items())
    return sum(path.stat().st_size for path in own) - size
