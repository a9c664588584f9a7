"""`generate` of compiled models: what the loop of transformers does with a plain one, it does with these."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, StaticCache, StoppingCriteriaList

import graftc
from graftc.runtime.compiled import Compiled
from graftc.testing.perturb import perturb
from tests.families import tiny
from tests.language_models import language_model, prompt
from tests.runtime.onnx_toy import fails
from tests.runtime.test_threads import at_once

LORA = {"method": "lora", "rank": 2, "target": {"role": ["attn.q", "attn.v"]}}
SOME: dict[str, Any] = {"max_new_tokens": 16, "min_new_tokens": 16}


@pytest.fixture(scope="module")
def source() -> Any:
    return language_model("llama")


@pytest.fixture(scope="module")
def compiled(source: Any) -> Any:
    made = graftc.compile({"adapt": [LORA]}, source).eval()
    perturb(made, 0.3)
    return made


@pytest.fixture(scope="module")
def merged(compiled: Any) -> Any:
    return compiled.merge()


@pytest.fixture(scope="module")
def plain(merged: Any) -> Any:
    """What all is compared with: a model of transformers that has the adaptation in its weights."""
    return merged.to_transformers()


def both(first: Any, second: Any, rows: int = 1, *, padded: bool = False, **options: Any) -> Tensor:
    """What two models generate, which is the same."""
    found = []
    for model in (first, second):
        torch.manual_seed(4)
        found.append(model.generate(**prompt(model, rows, padded=padded), **{**SOME, **options}))
    assert torch.equal(*found)
    return found[0]


def test_one_graph_serves_the_prompt_and_every_step(source: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = graftc.compile({"adapt": [LORA]}, source).eval()
    compiled.generate(**prompt(source, 2, padded=True), max_new_tokens=1)
    known = list(compiled.compilation.signatures)
    assert len(known) == 2, "that of a plain call, and that with a cache"
    monkeypatch.setattr("graftc.runtime.model.runner.signature_for", no_capture)
    for rows, options in ((3, {}), (2, {"num_beams": 3}), (5, {"do_sample": True})):
        found = compiled.generate(**prompt(source, rows, padded=True), max_new_tokens=64, min_new_tokens=64, **options)
        assert found.shape == (rows, 73)
    assert list(compiled.compilation.signatures) == known


def no_capture(*_: Any) -> Any:
    raise AssertionError("a call was taken for a new one")


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
def test_options(compiled: Any, plain: Any, options: dict[str, Any]) -> None:
    both(compiled, plain, **options)


def test_assistants(compiled: Any, merged: Any, plain: Any, source: Any) -> None:
    """A plain model, a compiled one and a merged one assist each other; what they draft decides nothing."""
    expected = both(compiled, plain)
    for model in (compiled, merged, plain):
        for assistant in (compiled, merged, source):
            found = model.generate(**prompt(model), **SOME, assistant_model=assistant)
            assert torch.equal(found, expected), (type(model), type(assistant))


def test_streamers(compiled: Any, plain: Any) -> None:
    class Streamer:
        def __init__(self) -> None:
            self.seen: list[Tensor] = []
            self.ended = False

        def put(self, tokens: Tensor) -> None:
            self.seen.append(tokens.flatten())

        def end(self) -> None:
            self.ended = True

    streamer = Streamer()
    found = both(compiled, plain)
    compiled.generate(**prompt(compiled), **SOME, streamer=streamer)
    assert streamer.ended and torch.equal(torch.cat(streamer.seen), found[0]) and len(streamer.seen) == 1 + 16


def test_embeddings(compiled: Any, source: Any) -> None:
    given = prompt(source, 3, padded=True)
    embeds = source.get_input_embeddings()(given["input_ids"])
    found = compiled.generate(inputs_embeds=embeds, attention_mask=given["attention_mask"], **SOME)
    assert torch.equal(found, compiled.generate(**given, **SOME)[:, 9:])


@pytest.mark.parametrize("beams", [1, 3])
def test_a_cache_goes_on_in_the_next_turn(compiled: Any, plain: Any, beams: int) -> None:
    found = []
    for model in (compiled, plain):
        cache = DynamicCache()
        options = {"num_beams": beams, "num_return_sequences": beams}
        said = model.generate(**prompt(model), **SOME, **options, cache=cache)
        assert cache.get_seq_length() == said.shape[1] - 1
        heard = torch.cat([said, torch.full((len(said), 3), 7)], 1)
        found.append(model.generate(heard, attention_mask=torch.ones_like(heard), cache=cache, **SOME))
    assert torch.equal(*found)


def test_the_base_generates_where_adaptations_are_off(compiled: Any, source: Any) -> None:
    whole = compiled.generate(**prompt(source, 3, padded=True), **SOME)
    with compiled.disabled():
        base = both(compiled, source, 3, padded=True)
    with compiled.disabled("lora"):
        both(compiled, source, 3, padded=True)
    assert not torch.equal(whole, base)


def test_gradients_go_through_a_cache(compiled: Any, source: Any) -> None:
    """Those of a text in two parts are those of the whole text; in train mode, too."""
    compiled.train()
    try:
        ids, tensors = prompt(source, 3)["input_ids"], [p for p in compiled.parameters() if p.requires_grad]
        first = compiled(input_ids=ids[:, :5], use_cache=True)
        second = compiled(input_ids=ids[:, 5:], cache=first.cache)
        assert second.cache is first.cache
        parts = torch.autograd.grad(second.logits.square().sum(), tensors)
        whole = torch.autograd.grad(compiled(input_ids=ids).logits[:, 5:].square().sum(), tensors)
        for part, expected in zip(parts, whole, strict=True):
            assert bool(expected.any())
            torch.testing.assert_close(part, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
        compiled.generate(**prompt(source), **SOME)
        assert compiled.training
    finally:
        compiled.eval()


@pytest.fixture(scope="module")
def bank(source: Any) -> Any:
    spec = {"adapt": [{**LORA, "name": "a"}, {**LORA, "name": "b"}], "compose": {"bank": ["a", "b"]}}
    made = graftc.compile(spec, source).eval()
    perturb(made, 0.3)
    return made


@pytest.fixture(scope="module")
def alone(bank: Any) -> list[Any]:
    return [bank.fix(name).merge().to_transformers() for name in "ab"]


class TestBanks:
    """Rows choose among two adaptations, each of which generates what it does alone."""

    @pytest.mark.parametrize("options", [{}, {"num_beams": 3, "num_return_sequences": 2}], ids=["greedy", "beams"])
    @pytest.mark.parametrize("chosen", [[0, 1, 1, 0], ["a", "b", "b", "a"], torch.tensor([0, 1, 1, 0])])
    def test_rows(self, bank: Any, alone: list[Any], chosen: Any, options: dict[str, Any]) -> None:
        given = prompt(bank, 4, padded=True)
        each = [model.generate(**given, **SOME, **options) for model in alone]
        assert not torch.equal(*each)
        rows = torch.tensor([0, 1, 1, 0]).repeat_interleave(options.get("num_return_sequences", 1))
        expected = torch.where(rows[:, None] == 0, *each)
        assert torch.equal(bank.generate(**given, **SOME, **options, adapter_ids=chosen), expected)

    @pytest.mark.parametrize("chosen", [{"adapter_ids": "b"}, {"adapter_weights": torch.tensor([0.0, 1.0])}])
    def test_one_for_all(self, bank: Any, alone: list[Any], chosen: dict[str, Any]) -> None:
        given = {**prompt(bank, 2), "num_beams": 2, **SOME}
        assert torch.equal(bank.generate(**given, **chosen), alone[1].generate(**given))

    def test_an_encoder_has_the_same_rows(self) -> None:
        spec = {"adapt": [{**LORA, "name": "a"}, {**LORA, "name": "b"}], "compose": {"bank": ["a", "b"]}}
        bank = graftc.compile(spec, language_model("t5")).eval()
        perturb(bank, 0.5)
        given = {**prompt(bank, 2, padded=True), "num_beams": 2, **SOME}
        each = [bank.generate(**given, adapter_ids=name) for name in "ab"]
        assert not torch.equal(*each)
        assert torch.equal(bank.generate(**given, adapter_ids=["a", "b"]), torch.stack([each[0][0], each[1][1]]))

    def test_wrong_choices(self, bank: Any) -> None:
        with fails("GC038", r"int64\[3\]"):
            bank.generate(**prompt(bank, 2), adapter_ids=[0, 1, 1], num_beams=2)
        with fails("GC038", "no slot 'c'"):
            bank.generate(**prompt(bank, 2), adapter_ids=["a", "c"])


LENGTH = 5


def in_front(source: Any, method: str, **fields: Any) -> Compiled:
    """A prefix, or virtual tokens."""
    made = graftc.compile({"adapt": [{"method": method, "length": LENGTH, **fields}]}, source).eval()
    perturb(made, 0.5)
    return made


def as_cache(prefixed: Compiled, rows: int) -> DynamicCache:
    """The keys and values of a prefix, as peft would put them into a model's cache."""
    config, tensors = prefixed.config, prefixed.adapter_state_dict()
    heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
    cache = DynamicCache()
    for layer, name in enumerate(sorted(n.removesuffix(".keys") for n in tensors if n.endswith(".keys"))):
        keys, values = (
            tensors[f"{name}.{part}"].view(LENGTH, heads, -1).transpose(0, 1) for part in ("keys", "values")
        )
        cache.update(keys.expand(rows, -1, -1, -1), values.expand(rows, -1, -1, -1), layer)
    return cache


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def base(request: pytest.FixtureRequest) -> Any:
    return language_model(request.param)


@pytest.fixture(scope="module")
def prefixed(base: Any) -> Any:
    return in_front(base, "prefix", positions="shifted")


class TestInFront:
    """What stands in front of a text is the first of a cache: tokens are those of the whole text at every step."""

    def test_a_prefix_is_the_source_models_cache(self, base: Any, prefixed: Any) -> None:
        given = prompt(base, 5, padded=True)
        mask = torch.cat([torch.ones(5, LENGTH, dtype=torch.int64), given["attention_mask"]], 1)
        positions = (given["attention_mask"].cumsum(-1) - 1).clamp(min=0) + LENGTH
        options = {"max_new_tokens": 32, "min_new_tokens": 32}
        expected = base.generate(
            given["input_ids"],
            attention_mask=mask,
            position_ids=positions,
            cache=as_cache(prefixed, 5),
            **options,
        )
        found = prefixed.generate(**given, **options)
        assert torch.equal(found, expected)
        assert not torch.equal(found, base.generate(**given, **options))
        assert torch.equal(found, prefixed.generate(**given, **options, use_cache=False))

    @pytest.mark.parametrize(
        "options",
        [{"rows": 3, "padded": True, "num_beams": 3}, {"prompt_lookup_num_tokens": 3}, {"rows": 2}],
        ids=["beams", "lookup", "no padding"],
    )
    def test_options(self, prefixed: Any, options: dict[str, Any]) -> None:
        wanted = {name: value for name, value in options.items() if name != "prompt_lookup_num_tokens"}
        given = prompt(prefixed, options.get("rows", 1), padded=options.get("padded", False))
        ways = [
            {name: value for name, value in each.items() if name not in ("rows", "padded")}
            for each in (options, wanted)
        ]
        found = prefixed.generate(**given, **SOME, **ways[0])
        assert torch.equal(found, prefixed.generate(**given, **SOME, **ways[1], use_cache=False))

    def test_embeddings(self, base: Any, prefixed: Any) -> None:
        given = prompt(base, 3, padded=True)
        embeds = base.get_input_embeddings()(given["input_ids"])
        found = prefixed.generate(inputs_embeds=embeds, attention_mask=given["attention_mask"], **SOME)
        assert torch.equal(found, prefixed.generate(**given, **SOME)[:, 9:])

    def test_virtual_tokens(self, base: Any) -> None:
        prompted = in_front(base, "prompt")
        given = prompt(base, 3, padded=True)
        found = prompted.generate(**given, **SOME)
        assert torch.equal(found, prompted.generate(**given, **SOME, use_cache=False))
        assert not torch.equal(found, base.generate(**given, **SOME))

    def test_threads(self, base: Any, prefixed: Any) -> None:
        """The first calls of a model, at once: what one thread leaves out, others keep."""
        fresh = graftc.compile(prefixed.spec, base).eval()
        fresh.load_adapter_state_dict(prefixed.adapter_state_dict())
        given = prompt(base, 3, padded=True)
        jobs: list[Callable[[Compiled], Any]] = [
            lambda model: model.generate(**given, **SOME),
            lambda model: model(**given).logits[given["attention_mask"].bool()],
            lambda model: model.generate(**prompt(base, 2, seed=8), **SOME, num_beams=2),
        ]
        expected = [job(prefixed) for job in jobs]
        for found, own in zip(at_once(*(lambda job=job: job(fresh) for job in jobs)), expected, strict=True):
            torch.testing.assert_close(found, own)

    def test_copies(self, base: Any, prefixed: Any) -> None:
        given = prompt(base, 2)
        expected = prefixed.generate(**given, **SOME)
        copied = copy.deepcopy(prefixed)
        assert torch.equal(copied.generate(**given, **SOME), expected)
        perturb(copied, 0.5)
        assert not torch.equal(copied.generate(**given, **SOME), expected)
        assert torch.equal(prefixed.generate(**given, **SOME), expected)


class TestRefused:
    """What cannot be is said, with a code, before anything is computed."""

    def test_encoders(self) -> None:
        with fails("GC142", ""):
            graftc.compile({"adapt": [LORA]}, tiny("bert")).generate(torch.ones(1, 3, dtype=torch.int64))

    @pytest.mark.parametrize(
        "cache",
        [
            lambda model: language_model("gpt2")(**prompt(model, 2), use_cache=True).cache,
            lambda model: model(**prompt(model, 3), use_cache=True).cache,
            lambda model: StaticCache(config=model.config, max_cache_len=32),
            lambda model: ((torch.zeros(2, 2, 3, 8),) * 2,) * 2,
        ],
        ids=["model", "batch", "static", "tuple"],
    )
    def test_caches(self, compiled: Any, cache: Any) -> None:
        with fails("GC140", ""):
            compiled(**prompt(compiled, 2), cache=cache(compiled))

    @pytest.mark.parametrize("kind", ["static", "quantized", "offloaded"])
    def test_kinds(self, compiled: Any, kind: str) -> None:
        with fails("GC140", kind):
            compiled.generate(**prompt(compiled), cache_implementation=kind)

    def test_a_cache_that_has_dropped_tokens(self) -> None:
        source = language_model("gemma3")
        compiled = graftc.compile({"adapt": [LORA]}, source).eval()
        dropped = source(**prompt(source), use_cache=True).cache
        ids = torch.ones(1, 10, dtype=torch.int64)
        with fails("GC140", "window of 8"):
            compiled.generate(ids, attention_mask=ids, cache=dropped)

    @pytest.mark.parametrize("family", ["gpt2", "opt", "bart"])
    def test_positions_beyond_the_table(self, family: str) -> None:
        source: Any = language_model(family)
        compiled = graftc.compile({"adapt": [LORA]}, source).eval()
        given, own = prompt(source), 1 if source.config.is_encoder_decoder else 9
        name = "decoder_input_ids" if source.config.is_encoder_decoder else "input_ids"
        long = {**{n: t for n, t in given.items() if name == "decoder_input_ids"}, name: torch.full((1, 97), 5)}
        with fails("GC143", "token 97 of a row"):
            compiled(**long)
        compiled(**{**long, name: torch.full((1, 96), 5)})
        most = 97 - own  # the last token goes into no call
        with fails("GC143", "token 97 of a row"):
            compiled.generate(**given, max_new_tokens=most + 1, eos_token_id=None)
        with fails("GC143", "token 97 of a row"):
            compiled.generate(**given, min_new_tokens=most + 1, max_new_tokens=most + 2)
        found = compiled.generate(**given, max_new_tokens=most, min_new_tokens=most)
        assert torch.equal(found, source.generate(**given, max_new_tokens=most, min_new_tokens=most))

    def test_padding_takes_no_positions(self) -> None:
        """A row of more tokens than there are positions, some of which are padding, has room."""
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

    def test_positions_that_a_call_gives(self) -> None:
        compiled = graftc.compile({"adapt": [LORA]}, language_model("gpt2")).eval()
        with fails("GC143", "token 101 of a row"):
            compiled(input_ids=torch.ones(1, 2, dtype=torch.int64), position_ids=torch.tensor([[3, 100]]))


def test_the_loops_own_methods_are_there(compiled: Any) -> None:
    """Those of the source's class, for transformers; a model that does not generate has none."""
    assert compiled._supports_logits_to_keep() and "input_ids" in inspect.signature(compiled.forward).parameters
    assert not hasattr(graftc.compile({"adapt": [LORA]}, tiny("bert")), "_supports_logits_to_keep")
