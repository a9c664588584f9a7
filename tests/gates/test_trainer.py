"""The transformers Trainer on MiniLM and R8: interrupted and resumed runs, and the contents of checkpoints."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch

import graftc
from tests.runtime.training.trainers import Run, check_checkpoint, interrupted

pytestmark = pytest.mark.gate

STEPS = 60
TOKENS = 64
"""Of each text: a processor without matrix units takes a second for a batch of longer ones in bfloat16."""
SPEC = {
    "adapt": [{"method": "lora", "rank": 8, "dropout": 0.1, "target": {"role": ["attn.q", "attn.v"]}}],
    "train": ["classifier"],
}


@pytest.fixture(scope="module")
def names() -> tuple[str, ...]:
    from graftc.applications.demo.data import load_r8

    return load_r8().names


def base(labels: int) -> Any:
    from transformers import AutoModelForSequenceClassification

    from graftc.applications.demo.data import find_model

    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_pretrained(find_model(), num_labels=labels)


def test_sixty_steps_interrupted_and_resumed(names: tuple[str, ...], tmp_path: Path) -> None:
    from transformers import AutoTokenizer, DataCollatorWithPadding

    from graftc.applications.demo.data import encode, find_model, load_r8

    tokenizer = AutoTokenizer.from_pretrained(find_model())
    data = encode(tokenizer, load_r8().train.subset(600))
    examples = [
        {"input_ids": list(ids)[:TOKENS], "labels": label} for ids, label in zip(data.ids, data.labels, strict=True)
    ]
    started = time.perf_counter()
    run = Run(
        lambda: graftc.compile(SPEC, base(len(names))),
        examples,
        STEPS,
        {},
        DataCollatorWithPadding(tokenizer),  # type: ignore[arg-type]
    )
    outcome = interrupted(run, tmp_path)
    seconds = time.perf_counter() - started
    beside = [check_checkpoint(folder, outcome.whole.model, base(len(names))) for folder in outcome.last]
    largest = outcome.differences()
    first, *_, last = [entry["eval_loss"] for entry in outcome.whole.state.log_history if "eval_loss" in entry]
    file = outcome.last[0] / "model.safetensors"
    print(f"{seconds:.0f} s, largest difference {largest}, eval loss {first:.3f} to {last:.3f}")
    print(f"{file.name} {file.stat().st_size:,} bytes, {max(beside):,} beside the adapters")
    assert largest == 0
    assert max(beside) < 2**20
    assert last < first
