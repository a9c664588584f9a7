"""Generation through libraries: pipelines of transformers and its sequence-to-sequence trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import graftc
from graftc.testing.perturbing import perturb
from tests.gates.test_generation import SPEC
from tests.kit.language_models import language_model
from tests.runtime.interop.trl_runs import tokenizer

pytestmark = pytest.mark.gate


def test_pipelines() -> None:
    """Compiled and merged models write the same texts as the folded model; batches are padded on the left."""
    from transformers import pipeline

    compiled = graftc.compile(SPEC, language_model("llama")).eval()
    perturb(compiled, 0.3)
    merged = compiled.merge()
    words = tokenizer()
    words.padding_side = "left"
    written = []
    for model in (compiled, merged, merged.to_transformers()):
        write = pipeline("text-generation", model=model, tokenizer=words, device="cpu")
        texts = write(["w3 w5 w7 w9", "w4 w8"], batch_size=2, max_new_tokens=24, do_sample=False)
        assisted = write("w3 w5 w7", assistant_model=compiled, max_new_tokens=24, do_sample=False)
        written.append([*texts, assisted])
    assert written[0] == written[1] == written[2]
    assert len({row[0]["generated_text"] for row in written[0]}) == 3


def test_the_trainer_predicts_by_generating(tmp_path: Path) -> None:
    from transformers import DataCollatorForSeq2Seq, Seq2SeqTrainer, Seq2SeqTrainingArguments

    compiled: Any = graftc.compile(SPEC, language_model("t5"))
    rows = [{"input_ids": [3 + k, 5, 7, 9 + k][: 3 + k % 2], "labels": [4 + k, 6, 8]} for k in range(8)]
    seen: list[Any] = []

    def look(prediction: Any) -> dict[str, float]:
        seen.append(torch.from_numpy(prediction.predictions))
        return {"answers": float(len(prediction.predictions))}

    arguments = Seq2SeqTrainingArguments(
        str(tmp_path),
        predict_with_generate=True,
        generation_max_length=12,
        generation_num_beams=2,
        max_steps=4,
        eval_strategy="steps",
        eval_steps=2,
        learning_rate=5e-2,
        per_device_train_batch_size=4,
        per_device_eval_batch_size=8,
        save_strategy="no",
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
    )
    collator = DataCollatorForSeq2Seq(tokenizer(), compiled)
    trainer = Seq2SeqTrainer(
        compiled, arguments, train_dataset=rows, eval_dataset=rows, compute_metrics=look, data_collator=collator
    )
    trainer.train()
    assert trainer.evaluate()["eval_answers"] == 8 and len(seen) == 3
    compiled.eval()
    batch = collator([{"input_ids": row["input_ids"]} for row in rows])
    expected = compiled.generate(**batch, max_length=12, num_beams=2)
    assert torch.equal(seen[-1][:, : expected.shape[1]], expected)
    assert not torch.equal(seen[0], seen[-1]), "training changes no answer"
