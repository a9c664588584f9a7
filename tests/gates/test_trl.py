"""TRL's trainers over compiled models, tiny and real: the same steps as over peft's, and one base in memory."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

import graftc
from graftc.runtime.compiled import Compiled
from tests.runtime.interop.trl_runs import SETTINGS, both, dpo, grpo, kto, logged, reward, scoring, sft

pytestmark = pytest.mark.gate

WAYS = {
    "packed": {"packing": True},
    "padded": {},
    "padding free": {"padding_free": True, "max_length": None},
}


@pytest.mark.parametrize("way", WAYS)
def test_fifty_steps_on_completions_are_those_of_peft(way: str, tmp_path: Path) -> None:
    runs = both(lambda model, folder: sft(model, folder, max_steps=50, **WAYS[way]), tmp_path)  # type: ignore[arg-type]
    losses, tensors = runs.losses(), runs.tensors()
    print(f"{way}: losses differ by {losses:.1e}, tensors by {tensors:.1e}")
    assert losses < 1e-5 and tensors < 1e-4
    assert len(runs.pair.ours.compilation.signatures) <= 2, "lengths of texts are not constants of a graph"


@pytest.mark.parametrize("trainer", [dpo, kto])
@pytest.mark.parametrize("precomputed", [False, True])
def test_twenty_steps_on_preferences_are_those_of_peft(trainer: Any, precomputed: bool, tmp_path: Path) -> None:
    def trainer_of(model: Any, folder: Path) -> Any:
        reference = model.reference() if isinstance(model, Compiled) else None
        return trainer(model, folder, reference, max_steps=20, precompute_ref_log_probs=precomputed)

    runs = both(trainer_of, tmp_path)
    losses, tensors = runs.losses(), runs.tensors()
    print(f"losses differ by {losses:.1e}, tensors by {tensors:.1e}")
    assert losses < 1e-5 and tensors < 1e-4


def test_twenty_steps_of_a_reward_model_are_those_of_peft(tmp_path: Path) -> None:
    runs = both(lambda model, folder: reward(model, folder, max_steps=20), tmp_path, scoring())
    losses, tensors = runs.losses(), runs.tensors()
    print(f"losses differ by {losses:.1e}, tensors by {tensors:.1e}")
    assert losses < 1e-5 and tensors < 1e-4


def test_eight_steps_on_what_it_generates_are_those_of_peft(tmp_path: Path) -> None:
    """Both sides sample the same answers, with the same rewards, and training on them gives the same result."""
    runs = both(lambda model, folder: grpo(model, folder, max_steps=8, learning_rate=1e-2), tmp_path)
    rewards = [logged(trainer, "reward") for trainer in (runs.ours, runs.theirs)]
    print(f"rewards {rewards[0]}, losses differ by {runs.losses('entropy'):.1e}, tensors by {runs.tensors():.1e}")
    assert rewards[0] == rewards[1] and len(set(rewards[0])) > 2
    assert runs.losses("entropy") < 1e-5 and runs.tensors() < 1e-4


TURNS = [
    ("Which city is the capital of {}?", "The capital of {} is {}."),
    ("Name the capital of {}.", "It is {1}, the capital of {0}."),
]
CAPITALS = {"France": "Paris", "Peru": "Lima", "Japan": "Tokyo", "Kenya": "Nairobi", "Norway": "Oslo", "Egypt": "Cairo"}


def conversations() -> Any:
    from datasets import Dataset

    rows = []
    for question, answer in TURNS:
        for country, city in CAPITALS.items():
            prompt = [{"role": "user", "content": question.format(country)}]
            rows.append(
                {"prompt": prompt, "completion": [{"role": "assistant", "content": answer.format(country, city)}]}
            )
    return Dataset.from_list(rows)


@pytest.mark.parametrize("packing", [False, True])
def test_twenty_steps_of_a_real_model_with_its_chat_template_are_those_of_peft(packing: bool, tmp_path: Path) -> None:
    import peft
    import torch
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    from graftc.applications.demo.decoder import find_decoder, load_decoder

    tokenizer = AutoTokenizer.from_pretrained(find_decoder())
    assert tokenizer.chat_template
    targets = ["q_proj", "v_proj", "down_proj"]
    adaptation = {"method": "lora", "rank": 8, "alpha": 16, "target": {"modules": [f"**.{name}" for name in targets]}}
    ours: Any = graftc.compile({"adapt": [adaptation]}, load_decoder())
    theirs = peft.get_peft_model(load_decoder(), peft.LoraConfig(r=8, lora_alpha=16, target_modules=targets))
    parameters = dict(theirs.named_parameters())
    with torch.no_grad():
        for name, tensor in ours.adapter_state_dict().items():
            module, part = name.split(".graftc.lora.")
            parameters[f"base_model.model.{module}.lora_{part}.default.weight"].copy_(tensor)
    losses: dict[str, list[float]] = {}
    for who, model in (("ours", ours), ("theirs", theirs)):
        arguments = SFTConfig(
            str(tmp_path / who),
            **{**SETTINGS, "per_device_train_batch_size": 2, "learning_rate": 1e-3},
            max_steps=20,
            max_length=96,
            packing=packing,
            completion_only_loss=True,
        )
        trainer = SFTTrainer(model=model, args=arguments, train_dataset=conversations(), processing_class=tokenizer)
        started = time.perf_counter()
        trainer.train()
        print(f"{who}: {time.perf_counter() - started:.0f} s")
        losses[who] = logged(trainer, "loss")
    worst = max(abs(a - b) / abs(b) for a, b in zip(losses["ours"], losses["theirs"], strict=True))
    print(f"losses {losses['ours'][0]:.3f} to {losses['ours'][-1]:.3f} differ by {worst:.1e} of peft's at most")
    assert len(losses["ours"]) == 20 and worst < 1e-4
    assert losses["ours"][-1] < losses["ours"][0] / 2
