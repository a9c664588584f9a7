"""One run of a TRL trainer over a compiled model and over peft's, from the same tensors."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from graftc.testing.families import llama
from tests.parity.support import Case, Names, Pair, pair

WORDS = 90
"""Of the tokenizer, ``w0`` to ``w89``; the rest of the tiny models' vocabulary are special tokens."""

LORA = Case(
    "llama",
    {"method": "lora", "rank": 4, "alpha": 8, "target": {"modules": ["**.q_proj", "**.v_proj", "**.down_proj"]}},
    lambda peft: peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"]),
    Names({"A": "lora_A.default.weight", "B": "lora_B.default.weight"}),
    noise=0.0,
)
"""LoRA of a tiny Llama as it starts: the second factor is zero."""


def tokenizer() -> Any:
    """Return a tokenizer of numbered words, with end and padding tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<eos>", "<unk>"]
    words = Tokenizer(
        models.WordLevel({w: i for i, w in enumerate([*(f"w{i}" for i in range(WORDS)), *special])}, unk_token="<unk>")
    )
    words.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def _text(draw: random.Random, low: int, high: int) -> str:
    return " ".join(f"w{draw.randrange(WORDS)}" for _ in range(draw.randint(low, high)))


def completions(count: int = 64) -> Any:
    """Return prompts with completions of different lengths."""
    from datasets import Dataset

    draw = random.Random(0)
    return Dataset.from_list(
        [{"prompt": _text(draw, 2, 6), "completion": " " + _text(draw, 3, 8)} for _ in range(count)]
    )


def preferences(count: int = 32) -> Any:
    """Return prompts with a chosen and a rejected answer."""
    from datasets import Dataset

    draw = random.Random(0)
    return Dataset.from_list(
        [
            {"prompt": _text(draw, 2, 5), "chosen": " " + _text(draw, 3, 6), "rejected": " " + _text(draw, 3, 6)}
            for _ in range(count)
        ]
    )


SETTINGS: Mapping[str, Any] = {
    "per_device_train_batch_size": 4,
    "learning_rate": 5e-3,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": [],
    "disable_tqdm": True,
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "seed": 3,
}
"""Arguments of every run."""


@dataclass(frozen=True)
class Both:
    """Two runs from the same tensors.

    Attributes:
        pair: the two trained models.
        ours, theirs: the trainers of the two models.
    """

    pair: Pair
    ours: Any
    theirs: Any

    def losses(self, key: str = "loss") -> float:
        """Return the largest relative difference of the values logged at a step."""
        mine, other = logged(self.ours, key), logged(self.theirs, key)
        assert len(mine) == len(other) > 1 and len({round(x, 4) for x in other}) > 1
        return max(abs(a - b) / abs(b) for a, b in zip(mine, other, strict=True))

    def tensors(self) -> float:
        """Return the largest relative difference of trained tensors from peft's, and check that all have moved."""
        own = dict(self.pair.ours.named_parameters())
        worst = 0.0
        for name, other in self.pair.tensors.items():
            assert bool(other.any()), f"{name} has not moved"
            mine = own[name].detach().reshape(other.shape)
            worst = max(worst, float((mine - other.detach()).norm() / other.detach().norm()))
        return worst


def logged(trainer: Any, key: str) -> list[float]:
    """Return the values that a trainer logged at its steps."""
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def both(trainer: Callable[[Any, Path], Any], folder: Path, base: Any = None) -> Both:
    """Train both models.

    Args:
        trainer: a function that returns a trainer for a model and a folder.
        folder: the folder that both write to.
        base: the base of both adapters; by default a tiny Llama with its head over the vocabulary.
    """
    models = pair(LORA, base)
    trainers = []
    for name, model in (("ours", models.ours), ("theirs", models.theirs)):
        torch.manual_seed(0)
        run = trainer(model, folder / name)
        run.train()
        trainers.append(run)
    return Both(models, *trainers)


def sft(model: Any, folder: Path, peft_config: Any = None, **changes: Any) -> Any:
    """Return a trainer for supervised fine-tuning on completions only."""
    from trl import SFTConfig, SFTTrainer

    arguments = SFTConfig(str(folder), **{**SETTINGS, "completion_only_loss": True, "max_length": 24, **changes})
    more = {"peft_config": peft_config} if peft_config is not None else {}
    return SFTTrainer(model=model, args=arguments, train_dataset=completions(), processing_class=tokenizer(), **more)


def trainer_for(kind: Any, model: Any, make: Any, **arguments: Any) -> Any:
    """Return a trainer; ``make`` is the method of a compiled model that creates one for it."""
    given = {name: value for name, value in arguments.items() if value is not None}
    given["processing_class"] = tokenizer()
    return kind(model=model, **given) if make is None else make(kind, **given)


def dpo(
    model: Any, folder: Path, ref_model: Any = None, make: Any = None, peft_config: Any = None, **changes: Any
) -> Any:
    """Return a trainer for preference optimisation; peft's model is its own reference."""
    from trl import DPOConfig, DPOTrainer

    arguments = DPOConfig(str(folder), **{**SETTINGS, "max_length": 24, **changes})
    return trainer_for(
        DPOTrainer,
        model,
        make,
        args=arguments,
        train_dataset=preferences(),
        ref_model=ref_model,
        peft_config=peft_config,
    )


def kto(
    model: Any, folder: Path, ref_model: Any = None, make: Any = None, peft_config: Any = None, **changes: Any
) -> Any:
    """Return a trainer for Kahneman-Tversky optimisation, on the same preferences."""
    from trl import KTOConfig, KTOTrainer, unpair_preference_dataset

    arguments = KTOConfig(str(folder), **{**SETTINGS, "max_length": 24, **changes})
    rows = unpair_preference_dataset(preferences())
    return trainer_for(
        KTOTrainer, model, make, args=arguments, train_dataset=rows, ref_model=ref_model, peft_config=peft_config
    )


def scoring() -> Any:
    """Return a tiny Llama that scores texts."""
    from transformers import LlamaForSequenceClassification

    config = llama().config
    config.num_labels, config.pad_token_id = 1, WORDS
    torch.manual_seed(0)
    return LlamaForSequenceClassification(config)


def reward(model: Any, folder: Path, **changes: Any) -> Any:
    """Return a trainer of a reward model on the same preferences."""
    from trl import RewardConfig, RewardTrainer

    arguments = RewardConfig(str(folder), **{**SETTINGS, "max_length": 24, **changes})
    return RewardTrainer(model=model, args=arguments, train_dataset=preferences(), processing_class=tokenizer())


def _rewarded(name: str, model: Any, folder: Path, make: Any, **changes: Any) -> Any:
    """Return a trainer that generates answers and rewards those with more even words."""
    import trl
    from datasets import Dataset

    def even(completions: list[str], **rest: Any) -> list[float]:
        return [float(sum(int(word[1:]) % 2 == 0 for word in re.findall(r"w\d+", text))) for text in completions]

    prompts = Dataset.from_list([{"prompt": row["prompt"]} for row in completions()])
    settings = {**SETTINGS, "num_generations": 4, "max_completion_length": 8, **changes}
    arguments = getattr(trl, f"{name}Config")(str(folder), **settings)
    return trainer_for(
        getattr(trl, f"{name}Trainer"), model, make, args=arguments, reward_funcs=even, train_dataset=prompts
    )


def grpo(model: Any, folder: Path, make: Any = None, **changes: Any) -> Any:
    """Return a trainer for group relative policy optimisation."""
    return _rewarded("GRPO", model, folder, make, **changes)


def rloo(model: Any, folder: Path, make: Any = None, **changes: Any) -> Any:
    """Return a trainer for REINFORCE leave-one-out."""
    return _rewarded("RLOO", model, folder, make, **changes)
