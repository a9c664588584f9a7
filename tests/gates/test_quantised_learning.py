"""qLoRA and qSpIEL learn as much as LoRA and SpIEL: Reuters R52 on a pretrained encoder, three seeds."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

import graftc
from graftc.applications.demo.data import (
    DataSplit,
    Encoded,
    encode,
    evaluation_batches,
    find_data,
    find_model,
    read_tab,
    training_batches,
)

pytestmark = pytest.mark.gate

STEPS, BATCH, TOKENS, TESTED, SEEDS = 200, 24, 48, 1000, (0, 1, 2)
POINTS = 1.5
ROLES = ["attn.q", "attn.k", "attn.v", "attn.o", "ffn.up", "ffn.down"]
METHODS: dict[str, tuple[dict[str, Any], float]] = {
    "lora": ({"method": "lora", "rank": 8, "target": {"role": ROLES}}, 2e-3),
    "spiel": (
        {"method": "spiel", "density": 0.02, "interval": 20, "accumulation_steps": 4, "target": {"role": ROLES}},
        2e-3,
    ),
}


@cache
def data() -> tuple[Encoded, Encoded, int]:
    """Return the texts of the standard splits as tokens, and the number of classes."""
    from transformers import AutoTokenizer

    folder, tokenizer = find_data(), AutoTokenizer.from_pretrained(find_model())
    train, test = (read_tab(folder / f"reuters-r52-{part}.tab") for part in ("train", "test"))
    names = sorted({label for label, _ in train})
    index = {name: number for number, name in enumerate(names)}
    splits = [DataSplit(tuple(t for _, t in rows), tuple(index[label] for label, _ in rows)) for rows in (train, test)]
    return encode(tokenizer, splits[0], TOKENS), encode(tokenizer, splits[1].subset(TESTED), TOKENS), len(names)


def accuracy(name: str, seed: int, base: dict[str, Any] | None) -> float:
    """Return the accuracy after training, in percent."""
    from transformers import AutoModelForSequenceClassification

    training, testing, classes = data()
    torch.manual_seed(seed)
    model = AutoModelForSequenceClassification.from_pretrained(find_model(), num_labels=classes)
    adaptation, rate = METHODS[name]
    spec = {"adapt": [adaptation], "train": ["classifier", "bert.pooler"], **({"base": base} if base else {})}
    batches = training_batches(training, BATCH, seed)
    compiled = graftc.compile(graftc.Spec.model_validate(spec), model, next(batches), seed=seed)
    trained = [p for p in compiled.parameters() if p.requires_grad]
    optimiser = graftc.optim.AgedAdamW(compiled, lr=rate) if name == "spiel" else torch.optim.AdamW(trained, lr=rate)
    pace = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: min((step + 1) / (STEPS / 10), max(0.0, (STEPS - step) / (STEPS * 0.9)))
    )
    compiled.train()
    compiled.begin(total_steps=STEPS)
    for _ in range(STEPS):
        compiled(**next(batches)).loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimiser.step()
        compiled.after_step()
        pace.step()
        optimiser.zero_grad()
    compiled.eval()
    right = 0
    with torch.no_grad():
        for rows, batch in evaluation_batches(testing, 50):
            right += int((compiled(**batch).logits.argmax(-1) == torch.tensor([testing.labels[r] for r in rows])).sum())
    return 100 * right / len(testing)


@pytest.mark.parametrize("name", list(METHODS))
def test_learns_as_much_on_a_quantised_base(name: str) -> None:
    """Mean accuracies of three seeds differ by at most 1.5 points and are far above chance."""
    plain, quantised = (
        [accuracy(name, seed, base) for seed in SEEDS] for base in (None, {"quantize": "nf4", "double": True})
    )
    print(f"{name}: {plain} on float32, {quantised} on nf4")
    lost = sum(plain) / len(SEEDS) - sum(quantised) / len(SEEDS)
    assert lost <= POINTS and min(*plain, *quantised) > 75
