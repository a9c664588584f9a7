"""MiniLM with a masked-language-modelling head is trained once, reproducibly, and loads unchanged."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import benchmarks.masked_minilm as masked_minilm
from benchmarks.masked_minilm import Masked, Settings, find_masked_minilm, folder_of, report, texts, train
from graftc.applications.demo.data import find_model

SMALL = Settings(steps=3, rows=4, tokens=24, held_out=16, autocast=False)


@pytest.mark.full
def test_it_is_trained_once_and_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoTokenizer, BertForMaskedLM

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    model, _, figures = train(SMALL)
    folder = find_masked_minilm(SMALL)
    assert folder == folder_of(SMALL) and folder.is_relative_to(tmp_path)
    assert folder_of(Settings(steps=4)) != folder_of(Settings(steps=5))
    loaded = BertForMaskedLM.from_pretrained(folder)
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())
    assert loaded.cls.predictions.decoder.weight is loaded.bert.embeddings.word_embeddings.weight
    assert AutoTokenizer.from_pretrained(folder).mask_token == "[MASK]"
    kept = json.loads((folder / "figures.json").read_text())
    assert kept["after"] == figures["after"] and kept["after"]["perplexity"] < kept["before"]["perplexity"]
    assert f"{kept['after']['perplexity']:,.1f}" in report(kept)
    monkeypatch.setattr(masked_minilm, "train", None)
    assert find_masked_minilm(SMALL) == folder


def test_a_run_that_ends_early_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Model:
        def save_pretrained(self, folder: Path) -> None:
            folder.mkdir()
            (folder / "config.json").write_text("{}")
            raise KeyboardInterrupt

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(masked_minilm, "train", lambda *_: (Model(), None, {}))
    with pytest.raises(KeyboardInterrupt):
        find_masked_minilm(SMALL)
    assert not list(tmp_path.iterdir())


def test_tokens_are_masked_as_bert_does() -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(find_model())
    row = (tokenizer.cls_token_id, *range(2000, 2998), tokenizer.sep_token_id)
    data = Masked((row,) * 32, tokenizer, torch.Generator().manual_seed(0), 0.15)
    batch = data.collate(range(32), labels=True)
    ids, asked = torch.tensor([row] * 32), batch["labels"] != -100
    assert torch.equal(batch["labels"][asked], ids[asked]) and not asked[:, [0, -1]].any()
    masks, same = batch["input_ids"] == tokenizer.mask_token_id, batch["input_ids"] == ids
    assert same[~asked].all()
    shares = [asked.float().mean(), masks[asked].float().mean(), same[asked].float().mean()]
    assert shares == pytest.approx([0.15, 0.8, 0.1], abs=0.01)


@pytest.mark.full
def test_no_text_of_the_test_splits_is_trained_on() -> None:
    assert not set(texts("train")) & set(texts("test"))
