"""Train a small vision-language model, tune both of its towers with LoRA, fold, reload it with transformers, and ask.

python examples/vision_language/train.py [OUT] [--quick]        needs pip install 'graftc[train,demo]'
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from model import Collator, ask, assemble, pretrain_tower
from pictures import Picture, draw
from transformers import LlavaForConditionalGeneration, Trainer, TrainingArguments

import graftc

ALIGN = {"version": 1, "adapt": [{"method": "full", "target": {"modules": "**.multi_modal_projector.*"}}]}
TUNE = {
    "version": 1,
    "adapt": [
        {"name": "vision", "method": "lora", "rank": 8, "target": {"modules": "**.vision_tower.**.self_attn.*_proj"}},
        {"name": "text", "method": "lora", "rank": 8, "target": {"modules": "**.language_model.**.self_attn.*_proj"}},
    ],
    "train": ["model.multi_modal_projector"],
}


def train(
    spec: Any, base: Any, rows: list[Any], collator: Collator, steps: int, batch: int, rate: float, out: Path
) -> Any:
    """Compile the model with ``spec``, and train it with the Trainer of transformers."""
    torch.manual_seed(0)
    compiled = graftc.compile(spec, base, collator(rows[:2]))
    report = compiled.report
    print(f"{report.trainable_parameters:,} trainable parameters, {report.percent:.2f} % of the model")
    arguments = TrainingArguments(
        str(out),
        max_steps=steps,
        per_device_train_batch_size=batch,
        learning_rate=rate,
        lr_scheduler_type="cosine",
        warmup_steps=min(10, steps // 4),
        logging_steps=max(1, steps // 8),
        save_strategy="no",
        remove_unused_columns=False,
        report_to=[],
        dataloader_pin_memory=False,
        disable_tqdm=True,
    )
    Trainer(model=compiled, args=arguments, train_dataset=rows, data_collator=collator).train()
    return compiled.eval()


def right(model: Any, tokenizer: Any, pictures: list[Picture]) -> float:
    """Return the share of questions that the model answers correctly."""
    questions = [(p, q, a) for number, p in enumerate(pictures) for q, a in p.questions[number % 4 : number % 4 + 1]]
    return sum(ask(model, tokenizer, p, q) == a for p, q, a in questions) / len(questions)


def main(out: Path, quick: bool) -> None:
    torch.manual_seed(0)
    pictures, unseen = draw(64 if quick else 2000, seed=1), draw(4 if quick else 48, seed=2)
    tower = pretrain_tower(pictures, steps=5 if quick else 400)
    model, tokenizer = assemble(tower, layers=2 if quick else None)
    collator = Collator(tokenizer)

    captions = [{"picture": p, "question": "Describe the picture.", "answer": p.caption} for p in pictures]
    aligned = train(ALIGN, model, captions, collator, 4 if quick else 200, 8, 2e-3, out / "align")
    aligned.merge().save(out / "aligned", force=True)
    base = LlavaForConditionalGeneration.from_pretrained(out / "aligned").eval()

    questions = [{"picture": p, "question": q, "answer": a} for p in pictures for q, a in p.questions]
    print(f"right answers before LoRA: {right(base, tokenizer, unseen):.0%}")
    tuned = train(TUNE, base, questions, collator, 4 if quick else 250, 8, 1e-3, out / "tune")
    merged = tuned.merge()  # raises if the certificate does not pass
    print(f"certified: folded and unfolded outputs differ by at most {merged.certificate.largest_difference:.1e}")
    merged.save(out / "folded", force=True)
    tokenizer.save_pretrained(out / "folded")

    plain = LlavaForConditionalGeneration.from_pretrained(out / "folded").eval()  # no graftc needed from here on
    print(f"right answers of the folded model: {right(plain, tokenizer, unseen):.0%}")
    for question, answer in unseen[0].questions:
        print(f"{question} {ask(plain, tokenizer, unseen[0], question)!r} (it is {answer!r})")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", nargs="?", type=Path, default=Path("vision-language-out"))
    parser.add_argument("--quick", action="store_true", help="two layers of text and a few steps: see that it runs")
    arguments = parser.parse_args()
    main(arguments.out, arguments.quick)
