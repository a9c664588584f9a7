"""Calls with a cache that are refused, and their errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import StaticCache

import graftc
from graftc.testing.families import tiny
from tests.kit.language_models import CACHE, language_model, prompt
from tests.kit.models import fresh
from tests.runtime.onnx_generation.onnx_toy import fails

LORA = {"method": "lora", "rank": 2, "target": {"role": ["attn.q", "attn.v"]}}


@pytest.fixture(scope="module")
def llama() -> Any:
    return fresh(language_model("llama"), LORA)


@pytest.mark.slow
def test_encoders() -> None:
    with fails("GC142", ""):
        graftc.compile({"adapt": [LORA]}, tiny("bert")).generate(torch.ones(1, 3, dtype=torch.int64))


@pytest.mark.slow
@pytest.mark.parametrize(
    "cache",
    [
        lambda model: language_model("gpt2")(**prompt(model, 2), use_cache=True)[CACHE],
        lambda model: model(**prompt(model, 3), use_cache=True)[CACHE],
        lambda model: StaticCache(config=language_model("mistral").config, max_cache_len=32),
        lambda model: ((torch.zeros(2, 2, 3, 8),) * 2,) * 2,
    ],
    ids=["model", "batch", "sliding", "tuple"],
)
def test_caches(llama: Any, cache: Any) -> None:
    with fails("GC140", ""):
        llama(**prompt(llama, 2), cache=cache(llama))


@pytest.mark.parametrize("kind", ["offloaded_static", "quantized", "offloaded"])
def test_kinds(llama: Any, kind: str) -> None:
    with fails("GC140", kind):
        llama.generate(**prompt(llama), cache_implementation=kind)


@pytest.mark.full
def test_a_cache_that_has_dropped_tokens() -> None:
    source = language_model("gemma3")
    compiled = graftc.compile({"adapt": [LORA]}, source).eval()
    dropped = source(**prompt(source), use_cache=True)[CACHE]
    ids = torch.ones(1, 10, dtype=torch.int64)
    with fails("GC140", "window of 8"):
        compiled.generate(ids, attention_mask=ids, cache=dropped)


@pytest.mark.full
@pytest.mark.parametrize("family", ["gpt2", "opt", "bart"])
def test_positions_beyond_the_table(family: str) -> None:
    source: Any = language_model(family)
    compiled = graftc.compile({"adapt": [LORA]}, source).eval()
    given, length = prompt(source), 1 if source.config.is_encoder_decoder else 9
    name = "decoder_input_ids" if source.config.is_encoder_decoder else "input_ids"
    long = {**{n: t for n, t in given.items() if name == "decoder_input_ids"}, name: torch.full((1, 97), 5)}
    with fails("GC143", "token 97 of a row"):
        compiled(**long)
    compiled(**{**long, name: torch.full((1, 96), 5)})
    most = 97 - length  # the last token is not given to any call
    with fails("GC143", "token 97 of a row"):
        compiled.generate(**given, max_new_tokens=most + 1, eos_token_id=None)
    with fails("GC143", "token 97 of a row"):
        compiled.generate(**given, min_new_tokens=most + 1, max_new_tokens=most + 2)
    tokens = compiled.generate(**given, max_new_tokens=most, min_new_tokens=most)
    assert torch.equal(tokens, source.generate(**given, max_new_tokens=most, min_new_tokens=most))


@pytest.mark.full
def test_padding_takes_no_positions() -> None:
    """A row may have more tokens than there are positions, if enough of them are padding."""
    for family in ("gpt2", "opt"):
        source = language_model(family)
        compiled = graftc.compile({"adapt": [LORA]}, source).eval()
        ids = torch.full((1, 120), 5)
        mask = (torch.arange(120) >= 40).long()[None]
        options = {"attention_mask": mask, "max_new_tokens": 4, "min_new_tokens": 4}
        assert torch.equal(compiled.generate(ids, **options), source.generate(ids, **options))
        positions = torch.arange(120)[None] if family == "gpt2" else None
        with fails("GC143", "token 120 of a row"):
            compiled(input_ids=ids, attention_mask=torch.ones_like(mask), position_ids=positions)


@pytest.mark.slow
def test_positions_that_a_call_gives() -> None:
    compiled = graftc.compile({"adapt": [LORA]}, language_model("gpt2")).eval()
    with fails("GC143", "token 101 of a row"):
        compiled(input_ids=torch.ones(1, 2, dtype=torch.int64), position_ids=torch.tensor([[3, 100]]))


@pytest.mark.slow
def test_rows_of_several_adaptations() -> None:
    both = [{**LORA, "name": name} for name in "ab"]
    compiled = graftc.compile({"adapt": both, "compose": {"parallel": ["a", "b"]}}, language_model("llama")).eval()
    for options in ({}, {"use_cache": False}):
        with fails("GC141", "returns rows for each"):
            compiled.generate(**prompt(compiled), **options)
    with fails("GC141", "returns rows for each"):
        compiled(**prompt(compiled), use_cache=True)


@pytest.mark.slow
def test_a_mask_of_the_new_tokens_alone(llama: Any) -> None:
    given = prompt(llama)
    cache = llama(**given, use_cache=True)[CACHE]
    one = torch.ones(1, 1, dtype=torch.int64)
    with fails("GC031", r"attention_mask is \[1, 1\]"):
        llama(input_ids=one, attention_mask=one, cache=cache)
    assert llama(input_ids=one, attention_mask=one.expand(1, 10), cache=cache).logits.shape[1] == 1
