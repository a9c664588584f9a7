"""Graphs whose number of rows depends on data: T5 and BART classify by the rows of the last token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BartConfig, BartForSequenceClassification, T5Config, T5ForSequenceClassification

import graftc
from graftc.testing import perturb

TOKENS = {"vocab_size": 40, "d_model": 32, "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 3}
LORA = {"method": "lora", "rank": 2, "target": {"role": ["attn.q", "ffn.up"]}}


def _t5() -> Any:
    return T5ForSequenceClassification(T5Config(d_kv=16, d_ff=48, num_layers=1, num_heads=2, **TOKENS))


def _bart() -> Any:
    layers = {"encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    return BartForSequenceClassification(BartConfig(max_position_embeddings=32, **layers, **heads, **TOKENS))


@pytest.mark.full
@pytest.mark.sample("adapt0-_t5")
@pytest.mark.parametrize("make", [_t5, _bart])
@pytest.mark.parametrize("adapt", [{"method": "full"}, LORA])
def test_they_are_read_back_and_exported(make: Any, adapt: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = make().eval()
    compiled = graftc.compile({"adapt": [adapt]}, model).eval()
    perturb(compiled)
    compiled.save(tmp_path / "artifact")
    if adapt != LORA:
        compiled.export(tmp_path / "model.onnx")  # ONNX Runtime checks the file
    loaded = graftc.load(tmp_path / "artifact", model).eval()
    for rows in (1, 2, 5):
        ids = torch.randint(4, 40, (rows, 7))
        ids[:, -1] = 3
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        with torch.no_grad():
            assert torch.equal(loaded(**inputs).logits, compiled(**inputs).logits)
            assert not torch.equal(loaded(**inputs).logits, model(**inputs).logits)
