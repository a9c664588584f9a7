"""Caches of fixed length (``StaticCache``), in which calls write their keys and values in place."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import StaticCache

import graftc
from graftc.testing import perturb
from tests.kit.language_models import CACHE, language_model, prompt
from tests.kit.models import fresh
from tests.kit.releases import needs_one_graph
from tests.runtime.onnx_generation.onnx_toy import fails

LORA = {"method": "lora", "rank": 2, "target": {"role": ["attn.q", "attn.v"]}}
PREFIXES: dict[str, dict[str, Any]] = {
    "prefix": {"method": "prefix", "length": 3},
    "shifted": {"method": "prefix", "length": 3, "positions": "shifted"},
    "prompt": {"method": "prompt", "length": 3},
}
SOME: dict[str, Any] = {"max_new_tokens": 12, "min_new_tokens": 12}
STATIC = {"cache_implementation": "static"}


def adapted(family: str, *more: dict[str, Any]) -> Any:
    compiled = fresh(language_model(family), LORA, *more).eval()
    perturb(compiled, 0.3)
    return compiled


@pytest.fixture(scope="module")
def llama() -> Any:
    return adapted("llama")


def kinds(compiled: Any) -> list[str]:
    """Return the kinds of caches that the graphs of a model take."""
    return [text for key in compiled.compilation.signatures for text in key.inputs if text.startswith("cache:")]


def leaves_out_masks(compiled: Any) -> bool:
    """Return whether the loop of the installed transformers calls a model without a mask that is all ones."""
    source, calls = compiled.compilation.source, list[bool]()
    hook = source.register_forward_pre_hook(
        lambda module, args, given: calls.append(given.get("attention_mask") is None), with_kwargs=True
    )
    source.generate(**prompt(source), max_new_tokens=2)
    hook.remove()
    return any(calls)


@pytest.mark.slow
@pytest.mark.sample("llama")
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3", "mistral", "falcon", "t5", "bart", "whisper"])
def test_texts_are_those_of_a_cache_that_grows(family: str) -> None:
    """With padding, with beams, and behind a text of another length; graphs are captured once."""
    needs_one_graph(family)
    compiled = adapted(family)
    for rows, options in ((3, {}), (2, {"num_beams": 3}), (1, {"max_new_tokens": 20})):
        inputs = prompt(compiled, rows, padded=rows > 1)
        expected = compiled.generate(**inputs, **{**SOME, **options})
        assert torch.equal(compiled.generate(**inputs, **{**SOME, **options}, **STATIC), expected)
    fixed, growing = ([kind for kind in kinds(compiled) if word in kind] for word in ("fixed", "past"))
    kinds_of_calls = 2 if compiled.config.is_encoder_decoder or leaves_out_masks(compiled) else 1
    assert len(fixed) == len(growing) == kinds_of_calls  # with and without padding, or a first step and later ones


@pytest.mark.slow
@pytest.mark.parametrize("training", [False, True])
def test_calls_write_into_the_callers_cache(llama: Any, training: bool) -> None:
    """The tensors keep their places, and logits are those of a whole text; in train mode as well, without gradients."""
    compiled, ids = copy.deepcopy(llama).train(training), prompt(llama, 2)["input_ids"]
    cache = StaticCache(config=compiled.config, max_cache_len=16)
    with torch.no_grad():
        expected = compiled(input_ids=ids).logits
        first = compiled(input_ids=ids[:, :5], cache=cache)
        assert first[CACHE] is cache and int(cache.get_seq_length()) == 5
        places = [tensor.data_ptr() for layer in cache.layers for tensor in (layer.keys, layer.values)]
        behind = [compiled(input_ids=ids[:, at : at + 1], cache=cache).logits for at in range(5, ids.shape[1])]
    assert places == [tensor.data_ptr() for layer in cache.layers for tensor in (layer.keys, layer.values)]
    assert int(cache.get_seq_length()) == ids.shape[1]
    assert not cache.layers[0].keys[:, :, ids.shape[1] :].any()
    torch.testing.assert_close(torch.cat([first.logits, *behind], 1), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.sample("prefix")
@pytest.mark.parametrize("kind", PREFIXES)
def test_prefixes_are_the_first_contents(kind: str) -> None:
    """They are in the cache while the loop runs; afterwards it has the text alone, and can be continued."""
    compiled = adapted("llama", PREFIXES[kind])
    inputs = prompt(compiled, 2, padded=True)
    expected = compiled.generate(**inputs, **SOME, return_dict_in_generate=True)
    outputs = compiled.generate(**inputs, **SOME, **STATIC, return_dict_in_generate=True)
    assert torch.equal(outputs.sequences, expected.sequences)
    length = outputs.sequences.shape[1] - 1
    assert int(outputs[CACHE].get_seq_length()) == expected[CACHE].get_seq_length() == length
    for own, other in zip(outputs[CACHE].layers, expected[CACHE].layers, strict=True):
        torch.testing.assert_close(own.keys[:, :, :length], other.keys, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_what_is_trained_shows_in_the_next_token(llama: Any) -> None:
    compiled, inputs = copy.deepcopy(llama), prompt(llama)
    before = compiled.generate(**inputs, **SOME, **STATIC)
    with torch.no_grad():
        for parameter in compiled.parameters():
            if parameter.requires_grad:
                parameter.mul_(-2)
    after = compiled.generate(**inputs, **SOME, **STATIC)
    assert not torch.equal(after, before) and torch.equal(after, compiled.generate(**inputs, **SOME))


@pytest.mark.slow
def test_rows_choose_adapters() -> None:
    spec = {"adapt": [{**LORA, "name": "a"}, {**LORA, "name": "b"}], "compose": {"bank": ["a", "b"]}}
    compiled = graftc.compile(spec, language_model("llama")).eval()
    perturb(compiled, 0.3)
    inputs = prompt(compiled, 3)
    rows = torch.tensor([0, 1, 0])
    expected = compiled.generate(**inputs, **SOME, adapter_ids=rows)
    assert torch.equal(compiled.generate(**inputs, **SOME, **STATIC, adapter_ids=rows), expected)


@pytest.mark.full
def test_an_artifact_has_the_graph(llama: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    language_model("llama").save_pretrained(tmp_path / "base")
    source = type(language_model("llama")).from_pretrained(tmp_path / "base")
    compiled = fresh(source, LORA).eval()
    perturb(compiled, 0.3)
    expected = compiled.generate(**prompt(compiled), **SOME, **STATIC)
    compiled.save(tmp_path / "artifact")

    def never(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a graph was captured again")

    monkeypatch.setenv("GRAFTC_CACHE", "off")
    monkeypatch.setattr("graftc.compiler.capture.capture_cache.capture", never)
    loaded = graftc.load(tmp_path / "artifact").eval()
    assert torch.equal(loaded.generate(**prompt(loaded), **SOME, **STATIC), expected)


@pytest.mark.slow
def test_refusals(llama: Any) -> None:
    ids = prompt(llama, 2)["input_ids"]
    cache = StaticCache(config=llama.config, max_cache_len=6)
    with fails("GC140", "room for 6 tokens, 0 of which"), torch.no_grad():
        llama(input_ids=ids[:, :7], cache=cache)
    with torch.no_grad():
        llama(input_ids=ids[:, :5], cache=cache)
    before = [layer.keys.clone() for layer in cache.layers]
    with fails("GC140", "room for 6 tokens, 5 of which"), torch.no_grad():
        llama(input_ids=ids[:, :2], cache=cache)
    with fails("GC140", "is float32"), torch.no_grad():
        llama(input_ids=ids[:1, :1], cache=cache)
    with fails("GC031", "attention_mask"), torch.no_grad():
        llama(input_ids=ids[:, :1], cache=cache, attention_mask=torch.ones(2, 7, dtype=torch.int64))
    assert all(map(torch.equal, before, (layer.keys for layer in cache.layers)))
    cache.layers[1].cumulative_length.add_(-1)
    with fails("GC140", "its layers have 4 to 5 tokens"), torch.no_grad():
        llama(input_ids=ids[:, :1], cache=cache)


@pytest.mark.full
def test_steps_are_compiled_once(llama: Any) -> None:
    """Neither another token nor another prompt, nor trained values, compile the code again."""
    inputs = [prompt(llama, 2, padded=True, seed=seed) for seed in (3, 4)]
    expected = [llama.generate(**own, max_new_tokens=24, min_new_tokens=24, **STATIC) for own in inputs]
    copied = copy.deepcopy(llama)
    torch._dynamo.reset()
    counters.clear()
    try:
        copied.compile(backend="aot_eager", fullgraph=True)
        copied.generate(**inputs[0], max_new_tokens=24, min_new_tokens=24, **STATIC)
        assert not counters["graph_break"]
        with torch.compiler.set_stance("fail_on_recompile"):
            tokens = [copied.generate(**own, max_new_tokens=24, min_new_tokens=24, **STATIC) for own in inputs]
            with torch.no_grad():
                for parameter in copied.parameters():
                    parameter.add_(0.01 * parameter.requires_grad)
            copied.generate(**inputs[1], max_new_tokens=24, min_new_tokens=24, **STATIC)
    finally:
        torch._dynamo.reset()
    assert all(map(torch.equal, tokens, expected))
