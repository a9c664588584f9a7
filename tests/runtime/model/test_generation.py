"""`generate` of compiled models gives what transformers' loop gives with a plain model."""

from __future__ import annotations

import copy
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor
from torch._dynamo.utils import counters
from transformers import DynamicCache, GenerationConfig, PreTrainedTokenizerFast, StoppingCriteriaList

import graftc
from graftc.testing.families import tiny
from graftc.testing.perturbing import perturb
from tests.kit.language_models import CACHE, language_model, prompt
from tests.kit.models import adapted
from tests.runtime.model.test_threads import at_once
from tests.runtime.onnx_generation.onnx_toy import fails

LORA = {"method": "lora", "rank": 2, "target": {"role": ["attn.q", "attn.v"]}}
SOME: dict[str, Any] = {"max_new_tokens": 16, "min_new_tokens": 16}


@pytest.fixture(scope="module")
def source() -> Any:
    return language_model("llama")


@pytest.fixture(scope="module")
def adapted_model(source: Any) -> Any:
    return adapted(source, LORA, noise=0.3)


@pytest.fixture(scope="module")
def merged(adapted_model: Any) -> Any:
    return adapted_model.merge()


@pytest.fixture(scope="module")
def plain(merged: Any) -> Any:
    """The reference: a transformers model that has the adaptation in its weights."""
    return merged.to_transformers()


def both(first: Any, second: Any, rows: int = 1, *, padded: bool = False, **options: Any) -> Tensor:
    """Generate with two models, check that the results are equal, and return them."""
    results = []
    for model in (first, second):
        torch.manual_seed(4)
        results.append(model.generate(**prompt(model, rows, padded=padded), **{**SOME, **options}))
    assert torch.equal(*results)
    return results[0]


@pytest.mark.full
def test_one_graph_serves_the_prompt_and_every_step(source: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = graftc.compile({"adapt": [LORA]}, source).eval()
    compiled.generate(**prompt(source, 2, padded=True), max_new_tokens=1)
    known = list(compiled.compilation.signatures)
    assert len(known) == 2, "that of a plain call, and that with a cache"
    monkeypatch.setattr("graftc.runtime.model.model_runner.signature_for", no_capture)
    for rows, options in ((3, {}), (2, {"num_beams": 3}), (5, {"do_sample": True})):
        tokens = compiled.generate(**prompt(source, rows, padded=True), max_new_tokens=64, min_new_tokens=64, **options)
        assert tokens.shape == (rows, 73)
    assert list(compiled.compilation.signatures) == known


def no_capture(*_: Any) -> Any:
    raise AssertionError("a call was taken for a new one")


@pytest.mark.full
@pytest.mark.parametrize("way", ["compile", "forward"])
def test_steps_of_a_model_under_torch_compile_are_not_compiled_again(adapted_model: Any, way: str) -> None:
    """Only a prompt, a first step, and a second step with a past of another length are compiled."""
    given = prompt(adapted_model, 2, padded=True)
    expected = adapted_model.generate(**given, max_new_tokens=64, min_new_tokens=64)
    copied = copy.deepcopy(adapted_model)
    torch._dynamo.reset()
    counters.clear()
    try:
        if way == "compile":
            copied.compile(backend="aot_eager")
        else:
            copied.forward = torch.compile(copied.forward, backend="eager")
        copied.generate(**given, max_new_tokens=3, min_new_tokens=3)
        assert counters["stats"]["unique_graphs"] == 3 and not counters["graph_break"]
        with torch.compiler.set_stance("fail_on_recompile"):
            tokens = copied.generate(**given, max_new_tokens=64, min_new_tokens=64)
    finally:
        torch._dynamo.reset()
    assert torch.equal(tokens, expected)


@pytest.mark.slow
def test_a_copy_generates_with_its_own_tensors(adapted_model: Any, merged: Any) -> None:
    given = prompt(adapted_model, 2)
    expected = adapted_model.generate(**given, **SOME)
    copied = copy.deepcopy(adapted_model)
    assert torch.equal(copied.generate(**given, **SOME), expected)
    perturb(copied, 0.5, seed=3)
    assert not torch.equal(copied.generate(**given, **SOME), expected)
    assert torch.equal(adapted_model.generate(**given, **SOME), expected)
    assert torch.equal(copy.deepcopy(merged).generate(**given, **SOME), expected)


@pytest.mark.full
def test_what_is_saved_has_the_graphs_that_generate(source: Any, tmp_path: Path) -> None:
    source.save_pretrained(tmp_path / "base")
    compiled = graftc.compile({"adapt": [LORA]}, type(source).from_pretrained(tmp_path / "base")).eval()
    perturb(compiled, 0.3)
    expected = compiled.generate(**prompt(source), **SOME)
    loaded = graftc.load(compiled.save(tmp_path / "artifact")).eval()
    assert torch.equal(loaded.generate(**prompt(source), **SOME), expected)
    assert list(loaded.compilation.signatures) == list(compiled.compilation.signatures)
    assert len(loaded.compilation.signatures) == 2
    with fails("GC033", ""):
        loaded.to(torch.bfloat16)


def letters(model: Any) -> Any:
    """Return a tokenizer whose tokens are single characters, from ``!`` on."""
    tokenizer = Tokenizer(BPE({chr(33 + token): token for token in range(model.config.vocab_size)}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = ByteLevel(add_prefix_space=False), ByteLevelDecoder()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.mark.slow
@pytest.mark.parametrize("in_config", [True, False])
def test_generation_stops_at_strings(adapted_model: Any, plain: Any, in_config: bool) -> None:
    """The loop passes the tokenizer to the model, which ignores it."""
    ids = prompt(plain)["input_ids"]
    whole = plain.generate(input_ids=ids, **SOME)
    stops = [chr(33 + int(whole[0, ids.shape[1] + 3]))]
    fixed: dict[str, Any] = {"max_new_tokens": 16, "tokenizer": letters(plain)}
    if in_config:
        fixed["generation_config"] = GenerationConfig(stop_strings=stops, max_new_tokens=16)
    else:
        fixed["stop_strings"] = stops
    expected = plain.generate(input_ids=ids, **fixed)
    assert expected.shape[1] < whole.shape[1]
    assert torch.equal(adapted_model.generate(input_ids=ids, **fixed), expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"rows": 5, "padded": True},
        {"rows": 2, "num_beams": 3, "num_return_sequences": 2},
        {"do_sample": True, "num_return_sequences": 3, "top_p": 0.9},
        {"prompt_lookup_num_tokens": 3},
        {"use_cache": False},
        {"rows": 3, "padded": True, "prefill_chunk_size": 4},
        {"generation_config": GenerationConfig(num_beams=2, repetition_penalty=1.4, pad_token_id=0, eos_token_id=2)},
        {"stopping_criteria": StoppingCriteriaList([lambda ids, scores: ids.new_ones(len(ids)).bool()])},
    ],
    ids=["padded", "beams", "sampled", "lookup", "no cache", "chunks", "config", "stopped"],
)
def test_options(adapted_model: Any, plain: Any, options: dict[str, Any]) -> None:
    both(adapted_model, plain, **options)


@pytest.mark.full
def test_assistants(adapted_model: Any, merged: Any, plain: Any, source: Any) -> None:
    """Plain, compiled and merged models assist each other, and their drafts do not change the result."""
    expected = both(adapted_model, plain)
    for model in (adapted_model, merged, plain):
        for assistant in (adapted_model, merged, source):
            tokens = model.generate(**prompt(model), **SOME, assistant_model=assistant)
            assert torch.equal(tokens, expected), (type(model), type(assistant))


def test_streamers(adapted_model: Any, plain: Any) -> None:
    class Streamer:
        def __init__(self) -> None:
            self.seen: list[Tensor] = []
            self.ended = False

        def put(self, tokens: Tensor) -> None:
            self.seen.append(tokens.flatten())

        def end(self) -> None:
            self.ended = True

    streamer = Streamer()
    generated = both(adapted_model, plain)
    adapted_model.generate(**prompt(adapted_model), **SOME, streamer=streamer)
    assert streamer.ended and torch.equal(torch.cat(streamer.seen), generated[0]) and len(streamer.seen) == 1 + 16


@pytest.mark.slow
def test_embeddings(adapted_model: Any, source: Any) -> None:
    given = prompt(source, 3, padded=True)
    embeds = source.get_input_embeddings()(given["input_ids"])
    tokens = adapted_model.generate(inputs_embeds=embeds, attention_mask=given["attention_mask"], **SOME)
    assert torch.equal(tokens, adapted_model.generate(**given, **SOME)[:, 9:])


@pytest.mark.parametrize("beams", [1, 3])
def test_a_cache_goes_on_in_the_next_turn(adapted_model: Any, plain: Any, beams: int) -> None:
    results = []
    for model in (adapted_model, plain):
        cache = DynamicCache()
        options = {"num_beams": beams, "num_return_sequences": beams}
        said = model.generate(**prompt(model), **SOME, **options, **{CACHE: cache})
        assert cache.get_seq_length() == said.shape[1] - 1
        heard = torch.cat([said, torch.full((len(said), 3), 7)], 1)
        results.append(model.generate(heard, attention_mask=torch.ones_like(heard), **{CACHE: cache}, **SOME))
    assert torch.equal(*results)


@pytest.mark.full
def test_the_base_generates_where_adaptations_are_off(adapted_model: Any, source: Any) -> None:
    whole = adapted_model.generate(**prompt(source, 3, padded=True), **SOME)
    with adapted_model.disabled():
        base = both(adapted_model, source, 3, padded=True)
    with adapted_model.disabled("lora"):
        both(adapted_model, source, 3, padded=True)
    assert not torch.equal(whole, base)


@pytest.mark.full
def test_gradients_go_through_a_cache(adapted_model: Any, source: Any) -> None:
    """Gradients of a text in two parts are those of the whole text, also in train mode."""
    adapted_model.train()
    try:
        ids, tensors = prompt(source, 3)["input_ids"], [p for p in adapted_model.parameters() if p.requires_grad]
        first = adapted_model(input_ids=ids[:, :5], use_cache=True)
        second = adapted_model(input_ids=ids[:, 5:], **{CACHE: first[CACHE]})
        assert second[CACHE] is first[CACHE]
        parts = torch.autograd.grad(second.logits.square().sum(), tensors)
        whole = torch.autograd.grad(adapted_model(input_ids=ids).logits[:, 5:].square().sum(), tensors)
        for part, expected in zip(parts, whole, strict=True):
            assert bool(expected.any())
            torch.testing.assert_close(part, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
        adapted_model.generate(**prompt(source), **SOME)
        assert adapted_model.training
    finally:
        adapted_model.eval()


@pytest.fixture(scope="module")
def bank(source: Any) -> Any:
    spec = {"adapt": [{**LORA, "name": "a"}, {**LORA, "name": "b"}], "compose": {"bank": ["a", "b"]}}
    model = graftc.compile(spec, source).eval()
    perturb(model, 0.3)
    return model


@pytest.fixture(scope="module")
def alone(bank: Any) -> list[Any]:
    return [bank.fix(name).merge().to_transformers() for name in "ab"]


@pytest.mark.slow
def test_threads(adapted_model: Any, plain: Any) -> None:
    """Several threads that generate with one model each get what it gives alone."""
    ways: list[dict[str, Any]] = [{"rows": 3, "padded": True}, {"rows": 2, "seed": 8}, {"rows": 1, "seed": 9}]
    given = [prompt(adapted_model, **way) for way in ways]
    results = at_once(*(lambda each=each: adapted_model.generate(**each, **SOME) for each in given))
    for each, own in zip(given, results, strict=True):
        assert torch.equal(own, plain.generate(**each, **SOME))


class TestBanks:
    """Rows choose between two adaptations, each of which generates what it does alone."""

    @pytest.mark.full
    @pytest.mark.parametrize("options", [{}, {"num_beams": 3, "num_return_sequences": 2}], ids=["greedy", "beams"])
    @pytest.mark.parametrize("chosen", [[0, 1, 1, 0], ["a", "b", "b", "a"], torch.tensor([0, 1, 1, 0])])
    def test_rows(self, bank: Any, alone: list[Any], chosen: Any, options: dict[str, Any]) -> None:
        given = prompt(bank, 4, padded=True)
        each = [model.generate(**given, **SOME, **options) for model in alone]
        assert not torch.equal(*each)
        rows = torch.tensor([0, 1, 1, 0]).repeat_interleave(options.get("num_return_sequences", 1))
        expected = torch.where(rows[:, None] == 0, *each)
        assert torch.equal(bank.generate(**given, **SOME, **options, adapter_ids=chosen), expected)

    @pytest.mark.full
    @pytest.mark.parametrize("chosen", [{"adapter_ids": "b"}, {"adapter_weights": torch.tensor([0.0, 1.0])}])
    def test_one_for_all(self, bank: Any, alone: list[Any], chosen: dict[str, Any]) -> None:
        given = {**prompt(bank, 2), "num_beams": 2, **SOME}
        assert torch.equal(bank.generate(**given, **chosen), alone[1].generate(**given))

    @pytest.mark.full
    def test_an_encoder_has_the_same_rows(self) -> None:
        spec = {"adapt": [{**LORA, "name": "a"}, {**LORA, "name": "b"}], "compose": {"bank": ["a", "b"]}}
        bank = graftc.compile(spec, language_model("t5")).eval()
        perturb(bank, 0.5)
        given = {**prompt(bank, 2, padded=True), "num_beams": 2, **SOME}
        each = [bank.generate(**given, adapter_ids=name) for name in "ab"]
        assert not torch.equal(*each)
        assert torch.equal(bank.generate(**given, adapter_ids=["a", "b"]), torch.stack([each[0][0], each[1][1]]))

    @pytest.mark.slow
    def test_wrong_choices(self, bank: Any) -> None:
        with fails("GC038", r"int64\[3\]"):
            bank.generate(**prompt(bank, 2), adapter_ids=[0, 1, 1], num_beams=2)
        with fails("GC038", "no slot 'c'"):
            bank.generate(**prompt(bank, 2), adapter_ids=["a", "c"])


@pytest.mark.slow
def test_the_loops_own_methods_are_there(adapted_model: Any) -> None:
    """The methods are those of the source's class, for transformers; a model that does not generate has none."""
    assert (
        adapted_model._supports_logits_to_keep() and "input_ids" in inspect.signature(adapted_model.forward).parameters
    )
    assert not hasattr(graftc.compile({"adapt": [LORA]}, tiny("bert")), "_supports_logits_to_keep")
