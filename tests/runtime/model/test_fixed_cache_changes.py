"""Caches of fixed length that something else changes, and what autograd and autocast do with them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import StaticLayer

from graftc.testing import perturb
from tests.kit.language_models import language_model, prompt
from tests.kit.models import fresh
from tests.runtime.onnx_generation.onnx_toy import fails

pytestmark = pytest.mark.slow

LORA = {"method": "lora", "rank": 2, "target": {"role": ["attn.q", "attn.v"]}}
CALLED = [7, 9]
ALORA = {"method": "alora", "rank": 2, "invocation": CALLED, "target": {"role": ["attn.q", "attn.k", "attn.v"]}}


def adapted(*adapt: dict[str, Any], dtype: torch.dtype = torch.float32) -> Any:
    compiled = fresh(language_model("llama").to(dtype), *adapt).eval()
    perturb(compiled, 0.3)
    return compiled


def static(length: int = 40) -> Any:
    return Cache(layers=[StaticLayer(length) for _ in range(2)])


@pytest.fixture(scope="module")
def lora() -> Any:
    return adapted(LORA, dtype=torch.float64)


@pytest.fixture(scope="module")
def alora() -> Any:
    return adapted(ALORA, dtype=torch.float64)


def text(compiled: Any, seed: int = 0) -> Tensor:
    """Return two rows of tokens without an invocation."""
    ids: Tensor = prompt(compiled, 2, seed=seed)["input_ids"]
    return ids.masked_fill(ids == CALLED[0], CALLED[0] + 1)


def cropped(compiled: Any, cache: Any) -> None:
    cache.crop(-3)


def continued(compiled: Any, cache: Any) -> None:
    language_model("llama").double()(input_ids=text(compiled, 5)[:, :3], past_key_values=cache)


def restarted(compiled: Any, cache: Any) -> None:
    cache.reset()
    language_model("llama").double()(input_ids=text(compiled, 5), past_key_values=cache)


@pytest.mark.full
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("change", [cropped, continued, restarted])
def test_an_invocation_in_a_changed_cache_is_not_assumed(alora: Any, change: Any, mode: Callable[[], Any]) -> None:
    """Earlier knowledge of the cache's text no longer holds; after a reset there is no text at all."""
    ids, cache = text(alora), static()
    called = torch.cat([ids, torch.tensor([CALLED] * 2)], 1)
    with mode():
        alora(input_ids=called, cache=cache)
        change(alora, cache)
        with fails("GC140", "whether the invocation"):
            alora(input_ids=ids[:, :2], cache=cache)


def test_an_invocation_in_the_cache_counts(alora: Any) -> None:
    """Text after it is adapted, token by token; a cache that was reset has none."""
    ids, cache = text(alora), static()
    called = torch.cat([ids, torch.tensor([CALLED] * 2), text(alora, 4)[:, :3]], 1)
    with torch.no_grad():
        expected = alora(input_ids=called).logits
        parts = called.split([called.shape[1] - 3, 1, 1, 1], 1)
        logits = [alora(input_ids=part, cache=cache).logits for part in parts]
        torch.testing.assert_close(torch.cat(logits, 1), expected, rtol=0, atol=1e-10)
        cache.reset()
        again = alora(input_ids=ids, cache=cache).logits
        torch.testing.assert_close(again, language_model("llama").double()(input_ids=ids).logits, rtol=0, atol=1e-10)


@pytest.mark.parametrize("training", [False, True])
def test_an_invocation_counts_while_gradients_flow(alora: Any, training: bool) -> None:
    """The cache then has new tensors after each call, and among them the number of its tokens."""
    compiled, cache = copy.deepcopy(alora).train(training), static()
    called = torch.cat([text(alora), torch.tensor([CALLED] * 2), text(alora, 4)[:, :4]], 1)
    expected = compiled(input_ids=called).logits
    parts = called.split([called.shape[1] - 4, 2, 2], 1)
    logits = [compiled(input_ids=part, cache=cache).logits for part in parts]
    torch.testing.assert_close(torch.cat(logits, 1), expected, rtol=0, atol=1e-10)


@pytest.mark.full
@pytest.mark.parametrize("training", [False, True])
def test_gradients_flow_through_earlier_tokens(lora: Any, training: bool) -> None:
    compiled = copy.deepcopy(lora).train(training)
    first, second = text(compiled), text(compiled, 5)

    def gradients(cache: Any) -> list[Tensor]:
        compiled.zero_grad()
        compiled(input_ids=first, cache=cache)
        compiled(input_ids=second, cache=cache).logits.square().mean().backward()
        return [p.grad.clone() for p in compiled.parameters() if p.grad is not None]

    expected = gradients(DynamicCache())
    torch.testing.assert_close(gradients(static()), expected, rtol=0, atol=1e-10)
    assert any(gradient.any() for gradient in expected)


@pytest.mark.full
@pytest.mark.parametrize("training", [False, True])
def test_autocast(training: bool) -> None:
    """The cache keeps its dtype, and results are as near to those in float32 as those of a cache that grows."""
    compiled, caches = adapted(LORA).train(training), (DynamicCache(), static())
    ids = text(compiled)
    with torch.no_grad():
        exact = compiled(input_ids=ids).logits
        with torch.autocast("cpu", torch.bfloat16):
            parts = [[compiled(input_ids=part, cache=cache).logits for part in ids.split(3, 1)] for cache in caches]
    growing, fixed = (float((torch.cat(own, 1) - exact).square().mean().sqrt()) for own in parts)
    assert caches[1].layers[0].keys.dtype == torch.float32 and parts[0][0].dtype == torch.bfloat16
    assert 0 < fixed < 1.5 * growing


def test_padded_texts_are_not_packed(lora: Any, recwarn: pytest.WarningsRecorder) -> None:
    """Positions that start again behind padding are no second text."""
    lora.generate(**prompt(lora, 3, padded=True), max_new_tokens=3, cache_implementation="static")
    assert not [warning for warning in recwarn if "GC120" in str(warning.message)]


@pytest.mark.full
@pytest.mark.parametrize("count", [1, 2, 3])
def test_some_logits(lora: Any, count: int) -> None:
    ids = text(lora)
    with torch.no_grad():
        logits = lora(input_ids=ids, logits_to_keep=count, cache=static()).logits
        expected = lora(input_ids=ids, logits_to_keep=count, cache=DynamicCache()).logits
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("options", [{}, {"positions": "shifted"}, {"target": {"layers": "0"}}])
def test_prefixes_in_the_graph(options: dict[str, Any]) -> None:
    """Calls outside the loop compute prefixes in every call."""
    compiled = adapted({"method": "prefix", "length": 5, **options}, dtype=torch.float64)
    ids, caches = text(compiled), (DynamicCache(), static())
    with torch.no_grad():
        parts = [[compiled(input_ids=part, cache=cache).logits for part in ids.split(3, 1)] for cache in caches]
    torch.testing.assert_close(torch.cat(parts[1], 1), torch.cat(parts[0], 1), rtol=0, atol=1e-10)


def test_masks_cover_the_text(lora: Any) -> None:
    ids, cache = text(lora), static()
    with torch.no_grad():
        with fails("GC031", "attention_mask"):
            lora(input_ids=ids[:, :5], attention_mask=torch.ones(2, 3, dtype=torch.int64), cache=cache)
        lora(input_ids=ids[:, :5], cache=cache)
        with fails("GC031", "attention_mask"):
            lora(input_ids=ids[:, 5:], attention_mask=torch.ones(2, 3, dtype=torch.int64), cache=cache)
        mask = torch.ones(2, 40, dtype=torch.int64)
        whole = lora(input_ids=ids[:, 5:], attention_mask=mask, cache=cache).logits
    torch.testing.assert_close(whole, lora(input_ids=ids).logits[:, 5:], rtol=0, atol=1e-10)


def test_a_refused_call_leaves_an_empty_cache_empty(lora: Any) -> None:
    ids, cache = text(lora), static(4)
    with torch.no_grad():
        with fails("GC140", "room for 4 tokens, 0 of which"):
            lora(input_ids=ids[:, :5], cache=cache)
        lora(input_ids=ids[:1, :4], cache=cache)


@pytest.mark.full
def test_prompt_lookup_has_room(lora: Any) -> None:
    inputs = prompt(lora)
    options: dict[str, Any] = {"max_new_tokens": 12, "min_new_tokens": 12, "prompt_lookup_num_tokens": 3}
    expected = lora.generate(**inputs, **options)
    assert torch.equal(lora.generate(**inputs, **options, cache_implementation="static"), expected)
