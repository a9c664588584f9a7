"""The files of a TRL run in a folder: tiny bases with a tokenizer, data, and configs of TRL's command line."""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import yaml

from graftc.applications.trl.settings import TRAINERS
from graftc.testing.families import llama
from tests.runtime.interop.trl_runs import completions, logged, preferences, scoring, tokenizer

SETTINGS: dict[str, Any] = {
    **{"model_name_or_path": "base", "dataset_name": "texts", "output_dir": "out", "max_length": 24},
    **{"learning_rate": 5e-3, "per_device_train_batch_size": 4, "max_steps": 3, "logging_steps": 1, "seed": 3},
    **{"save_strategy": "no", "report_to": "none", "use_cpu": True, "bf16": False, "gradient_checkpointing": False},
    "disable_tqdm": True,
}
PEFT: dict[str, Any] = {
    **{"use_peft": True, "lora_r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "lora_target_modules": ["q_proj", "v_proj"]}
}
ANSWERS = {"reward_funcs": [f"{__name__}.even"], "num_generations": 4, "max_completion_length": 8, "beta": 0.1}
OWN: dict[str, dict[str, Any]] = {
    "sft": {},
    "dpo": {"dataset_name": "pairs"},
    "kto": {"dataset_name": "pairs"},
    "reward": {"dataset_name": "pairs", "model_name_or_path": "scoring", "lora_task_type": "SEQ_CLS"},
    "grpo": ANSWERS,
    "rloo": ANSWERS,
}
"""The keys of each trainer's config that differ from `SETTINGS`."""


def even(completions: list[str], **rest: Any) -> list[float]:
    """Return a reward for each completion: the number of its even words."""
    return [float(sum(int(word[1:]) % 2 == 0 for word in re.findall(r"w\d+", text))) for text in completions]


def write_files(folder: Path) -> None:
    """Write the bases ``base`` and ``scoring``, and the data sets ``texts`` and ``pairs``."""
    words = tokenizer()
    for name, model in (("base", llama()), ("scoring", scoring())):
        model.config.bos_token_id, model.config.eos_token_id = None, words.eos_token_id
        model.save_pretrained(folder / name)
        words.save_pretrained(folder / name)
    for name, rows in (("texts", completions(16)), ("pairs", preferences(16))):
        (folder / name).mkdir()
        lines = "\n".join(json.dumps(row) for row in rows)
        (folder / name / "train.jsonl").write_text(lines, encoding="utf-8")


def write_config(trainer: str, folder: Path, **changes: Any) -> Path:
    """Write a config with PEFT's settings, and return its path; a change to None removes a key."""
    settings = {**SETTINGS, **PEFT, **OWN[trainer]}
    if trainer in ("grpo", "rloo"):
        del settings["max_length"]
    settings = {key: value for key, value in {**settings, **changes}.items() if value is not None}
    path = folder / f"{trainer}.yaml"
    path.write_text(yaml.safe_dump(settings), encoding="utf-8")
    return path


def run_of_trl(trainer: str, config: Path, out: Path) -> list[float]:
    """Run TRL's own command with PEFT, and return the losses that its trainer has logged."""
    return _observed(trainer, lambda: _run_script(trainer, config, out))


def _run_script(trainer: str, config: Path, out: Path) -> None:
    script: Any = importlib.import_module(f"trl.scripts.{trainer}")
    words = ["--config", str(config), "--output_dir", str(out)]
    script.main(*script.make_parser().parse_args_and_config(words))


def _observed(trainer: str, run: Callable[[], None]) -> list[float]:
    trl: Any = importlib.import_module("trl")
    kind, created = getattr(trl, TRAINERS[trainer]), []

    def create(**arguments: Any) -> Any:
        created.append(kind(**arguments))
        return created[-1]

    with mock.patch.object(trl, TRAINERS[trainer], create):
        run()
    return logged(created[0], "loss")
