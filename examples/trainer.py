"""Train an adapted model with the Trainer of transformers: evaluation, checkpoints and the best model as usual.

python examples/trainer.py [OUT]        needs pip install 'graftc[train]'
"""

import sys
from pathlib import Path

import torch
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

import graftc

SPEC = Path(__file__).parent / "specs" / "classifier.yaml"
CLASSES, LENGTH, VOCABULARY = 3, 16, 100


def examples(count: int, seed: int) -> list[dict[str, torch.Tensor]]:
    """Make sequences of random tokens; the class says which of the tokens 0, 1 and 2 is hidden in the sequence."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for index in range(count):
        tokens = torch.randint(CLASSES, VOCABULARY, (LENGTH,), generator=generator)
        tokens[torch.randint(0, LENGTH, (3,), generator=generator)] = index % CLASSES
        rows.append({"input_ids": tokens, "labels": torch.tensor(index % CLASSES)})
    return rows


def main(out: Path) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    base = BertForSequenceClassification(BertConfig(vocab_size=VOCABULARY, num_labels=CLASSES, **sizes))
    arguments = TrainingArguments(
        str(out / "checkpoints"),
        num_train_epochs=8,
        per_device_train_batch_size=32,
        learning_rate=5e-3,
        eval_strategy="epoch",
        save_strategy="epoch",
        save_total_limit=1,
        load_best_model_at_end=True,
        report_to=[],
        dataloader_pin_memory=False,
        disable_tqdm=True,
    )
    data = {"train_dataset": examples(480, seed=1), "eval_dataset": examples(120, seed=2)}
    trainer = Trainer(model=graftc.compile(SPEC, base), args=arguments, **data)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    print(f"loss before {before:.3f}, after {trainer.evaluate()['eval_loss']:.3f}")
    trainer.model.merge().save(out / "folded", force=True)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "trainer-out"))
