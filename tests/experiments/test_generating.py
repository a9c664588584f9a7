"""The decoder's part: records that are kept apart, losses of targets alone, and scores of what is written."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from experiments import decoder_plan, generating
from experiments.decoder_plan import PLAIN, DecoderSetting
from experiments.generating import Encoded
from experiments.grammar import HELD_OUT, REFERENCES, TRAINED, examples
from experiments.sources import base_of

QUICK = DecoderSetting(quick=True)
ROWS = {row.name: row for row in decoder_plan.ROWS}


def test_groups_of_categories_share_nothing() -> None:
    """Neither categories nor attributes, so that a held-out record has words for which nothing was trained."""
    assert not TRAINED.keys() & HELD_OUT.keys()
    attributes = [{key for group in groups.values() for key in group} for groups in (TRAINED, HELD_OUT)]
    assert not attributes[0] & attributes[1]


@pytest.mark.parametrize("held_out", [False, True])
def test_a_sentence_says_what_is_in_the_record(held_out: bool) -> None:
    for own in examples(60, 3, held_out=held_out, references=REFERENCES):
        values = [part.partition(": ")[2] for part in own.record.split(" | ")]
        assert len(own.sentences) == REFERENCES and 4 <= len(values) <= 5
        assert all(value in sentence for sentence in own.sentences for value in values)


def test_records_are_drawn_once_and_without_those_that_are_reserved() -> None:
    some = examples(200, 1)
    assert len({own.record for own in some}) == 200 and some == examples(200, 1)
    reserved = {own.record for own in some[:50]}
    assert not reserved & {own.record for own in examples(200, 1, without=reserved)}


def test_only_targets_have_a_loss() -> None:
    """The loss over several batches is that of all tokens of targets together."""
    model = base_of("tiny-llama", torch.float32, 0).eval()
    data = Encoded(((5, 6, 7), (8, 9)) * 5, ((10, 11, 2), (12, 2)) * 5, 2)
    batch = data.batch([0, 1])
    assert batch["labels"].tolist() == [[-100, -100, -100, 10, 11, 2], [-100, -100, 12, 2, -100, -100]]
    expected = []
    for prompt, target in zip(data.prompts, data.targets, strict=True):
        with torch.no_grad():
            scores = model(input_ids=torch.tensor([[*prompt, *target]])).logits[0].log_softmax(-1)
        expected += [-float(scores[len(prompt) - 1 + k, token]) for k, token in enumerate(target)]
    assert abs(generating._loss(model, data) - sum(expected) / len(expected)) < 1e-5


@pytest.mark.slow
def test_a_model_that_writes_the_targets_has_full_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    targets: list[Any] = []

    def written(model: Any, data: Encoded, count: int) -> list[list[int]]:
        targets.append(data.targets)
        return [[*target, 7, 7] for target in data.targets]

    monkeypatch.setattr(generating, "_written", written)
    monkeypatch.setattr(generating, "_loss", lambda model, data: 1.0)
    words = generating._Words("smollm2")
    scores = generating._tested(None, words, generating._test(6, "unseen"), 8)
    assert scores["exact"] == 1 and abs(scores["bleu"] - 100) < 1e-6 and abs(scores["chrf"] - 100) < 1e-6


@pytest.mark.full
@pytest.mark.parametrize("name", [PLAIN, "LoRA, rank 4", "prompt", "prefix", "SpIEL"])
def test_rows_train_and_write(name: str) -> None:
    """Computing a cell twice gives the same figures."""
    cell = QUICK.cell(ROWS[name], 1e-3, 0).to_json()
    first, second = generating.figures(cell), generating.figures(cell)
    first.pop("times"), second.pop("times")
    assert first == second
    assert (first["trained"] == 0) == (name == PLAIN) == (first["loss"] is None)
    assert first["validation"] < 0 < first["loss_unseen"]
