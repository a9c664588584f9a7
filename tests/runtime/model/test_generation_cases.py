"""Unusual cases of generation: new tokens, chunks, the base alone, copies, autocast."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

import graftc
from graftc.specs.errors.diagnostics import GraftError, GraftWarning
from graftc.testing.families import tiny
from tests.kit.language_models import CACHE
from tests.kit.models import adapted

LORA: dict[str, Any] = {"method": "lora", "rank": 2, "target": {"role": ["attn.q", "attn.v"]}}
OPTIONS: dict[str, Any] = {"max_new_tokens": 10, "eos_token_id": None, "pad_token_id": 0, "do_sample": False}
IDS = torch.randint(3, 100, (2, 7), generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(IDS).index_fill(1, torch.tensor([0, 1]), 0)


def said(model: Any, **given: Any) -> Tensor:
    """Return the tokens that a model generates from the prompts."""
    tokens: Tensor = model.generate(IDS, **OPTIONS, **given)
    return tokens


@pytest.mark.full
def test_an_encoder_whose_table_is_longer_drops_nothing() -> None:
    """Resizing registers one table under several names, by which the tracer reaches modules."""
    model = tiny("t5", dropout_rate=0.5)
    compiled = graftc.compile({"adapt": [LORA], "tokens": {"add": ["<new>"]}}, model).eval()
    expected = said(model)
    assert torch.equal(said(compiled), expected) and torch.equal(said(compiled), expected)
    assert not [name for name, module in compiled.named_modules() if module.training]


@pytest.mark.full
def test_an_encoder_and_a_decoder_step_by_step() -> None:
    compiled = adapted("t5", LORA, noise=0.3)
    tokens = IDS[:, :3]
    with torch.no_grad():
        whole = compiled(input_ids=IDS, decoder_input_ids=tokens).logits
        encoded, results = compiled.get_encoder()(input_ids=IDS), []
        for given in ({"input_ids": IDS}, {"encoder_outputs": encoded}):
            cache, logits = None, []
            for step in range(3):
                outputs = compiled(**given, decoder_input_ids=tokens[:, step : step + 1], cache=cache, use_cache=True)
                cache = outputs[CACHE]
                logits.append(outputs.logits)
            results.append(torch.cat(logits, 1))
    for each in results:
        torch.testing.assert_close(each, whole, atol=3e-5, rtol=0)


@pytest.mark.full
def test_what_another_encoder_gave_is_refused() -> None:
    compiled = adapted("t5", LORA, noise=0.3)
    with pytest.raises(GraftError, match=r"GC031(.|\n)*get_encoder"):
        compiled(encoder_outputs=(torch.zeros(2, 7, 48),), decoder_input_ids=IDS, use_cache=True)


@pytest.mark.full
@pytest.mark.parametrize("method", ["prefix", "prompt"])
class TestFirstContents:
    """Adaptations that are the first contents of a cache."""

    def test_chunks_padding_and_no_cache(self, method: str) -> None:
        compiled = adapted("llama", {"method": method, "length": 3}, LORA, noise=0.3)
        with warnings.catch_warnings():
            warnings.simplefilter("error", GraftWarning)
            for mask in (torch.ones_like(IDS), MASK):
                expected = said(compiled, attention_mask=mask, use_cache=False)
                assert torch.equal(said(compiled, attention_mask=mask), expected)
                assert torch.equal(said(compiled, attention_mask=mask, prefill_chunk_size=3), expected)

    def test_the_base_alone_copies_and_autocast(self, method: str) -> None:
        compiled = adapted("llama", {"method": method, "length": 3}, noise=0.3)
        expected = said(compiled)
        with compiled.disabled():
            assert torch.equal(said(compiled), said(tiny("llama")))
        other = copy.deepcopy(compiled)
        with torch.no_grad():
            for parameter in (p for p in other.parameters() if p.requires_grad):
                parameter.mul_(-2)
        assert torch.equal(said(other), said(other, use_cache=False))
        with torch.autocast("cpu", torch.bfloat16):
            assert said(compiled).shape == expected.shape
        assert torch.equal(said(compiled), expected)


@pytest.mark.slow
def test_parallel_adaptations_do_not_generate() -> None:
    entries = [{**LORA, "name": name} for name in ("a", "b")]
    compiled = adapted("llama", *entries, noise=0.3, compose={"parallel": ["a", "b"]})
    for call in (lambda: said(compiled), lambda: compiled(IDS, use_cache=True)):
        with pytest.raises(GraftError, match="GC141"):
            call()
