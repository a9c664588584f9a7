"""The cache that calls return by default: as from the source model, in eval mode without labels."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache

import graftc
from graftc.runtime.model.deferred import deferred_cache
from graftc.testing.families import tiny
from graftc.testing.perturbing import perturb
from tests.kit.language_models import CACHE, language_model, prompt
from tests.kit.models import adapted
from tests.runtime.onnx_generation.onnx_toy import fails

LORA = {"method": "lora", "rank": 2, "target": {"role": ["attn.q", "attn.v"]}}
FAMILIES = ["llama", "t5", "gpt2", "mistral", "gemma3", "gpt_neox", "bart"]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    """A source model, and a compiled model of it, which computes the same since LoRA begins at the base."""
    source = language_model(request.param)
    return source, graftc.compile({"adapt": [LORA]}, source).eval()


@pytest.fixture(scope="module")
def source() -> Any:
    return language_model("llama")


@pytest.fixture(scope="module")
def adapted_model(source: Any) -> Any:
    return adapted(source, LORA, noise=0.3)


def text(model: Any, *, masked: bool) -> dict[str, Tensor]:
    given = prompt(model, 3, padded=masked)
    if not masked:
        del given["attention_mask"]
    if model.config.is_encoder_decoder:
        given["decoder_input_ids"] = given["input_ids"][:, :4].flip(0)
    return given


def steps(model: Any, masked: bool, *, plain: bool) -> list[Tensor]:
    """Return the logits of a text and of three tokens after it, continued by hand from the returned caches."""
    given, results = text(model, masked=masked), []
    name = "decoder_input_ids" if model.config.is_encoder_decoder else "input_ids"
    options: dict[str, Any] = {"return_dict": False} if plain else {}
    with torch.no_grad():
        for _ in range(4):
            outputs = model(**given, **options)
            logits, cache = outputs[:2]
            assert cache is not None and (plain or cache is outputs.past_key_values)
            results.append(logits)
            given = {**given, name: logits[:, -1:].argmax(-1), "past_key_values": cache}
            if masked and not model.config.is_encoder_decoder:
                mask = given["attention_mask"]
                given["attention_mask"] = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
    return results


@pytest.mark.sample("llama-whole-class")
@pytest.mark.parametrize("plain", [False, True], ids=["class", "tuple"])
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "padded"])
def test_going_on_by_hand(pair: tuple[Any, Any], masked: bool, plain: bool) -> None:
    for theirs, ours in zip(*(steps(model, masked, plain=plain) for model in pair), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


OPTIONS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "no cache": {"use_cache": False},
    "cache": {"use_cache": True},
    "hidden states": {"output_hidden_states": True},
}


@pytest.mark.sample("llama-as it is", "llama-no cache")
@pytest.mark.parametrize("option", OPTIONS)
def test_outputs_have_the_fields_of_the_sources(pair: tuple[Any, Any], option: str) -> None:
    given, options = text(pair[0], masked=False), OPTIONS[option]
    with torch.no_grad():
        theirs, ours = (model(**given, **options) for model in pair)
        tuples = [model(**given, **options, return_dict=False) for model in pair]
    assert type(ours) is type(theirs) and list(ours) == list(theirs)
    assert [len(each) for each in tuples] == [len(theirs.to_tuple())] * 2
    kinds = (DynamicCache, EncoderDecoderCache, tuple, Tensor)
    for one, other in zip(*tuples, strict=True):
        assert [isinstance(one, kind) for kind in kinds] == [isinstance(other, kind) for kind in kinds]
    if options.get("use_cache") is not False:
        assert len(ours.past_key_values) == 2


@pytest.mark.full
def test_a_config_that_wants_tuples() -> None:
    source = tiny("bert").eval()
    source.config.return_dict = False
    compiled = graftc.compile({"adapt": [LORA]}, source).eval()
    ids, labels = torch.randint(5, 50, (2, 6)), torch.zeros(2, dtype=torch.long)
    for options in ({}, {"labels": labels}, {"return_dict": False}):
        theirs, ours = source(ids, **options), compiled(ids, **options)
        assert type(ours) is type(theirs) is tuple and len(ours) == len(theirs)
        torch.testing.assert_close(ours[0], theirs[0])
    assert list(compiled(ids, return_dict=True)) == ["logits"]


def test_nobody_pays_for_a_cache_that_is_left_alone(source: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls in eval mode capture nothing with a cache until one is used."""
    compiled = graftc.compile({"adapt": [LORA]}, source).eval()
    ids = prompt(source, 2)["input_ids"]
    with torch.no_grad():
        compiled(input_ids=ids)
        known = list(compiled.compilation.signatures)
        runs: list[Any] = []
        run = type(compiled._graftc).results
        monkeypatch.setattr(
            type(compiled._graftc), "results", lambda self, key, given: (runs.append(key), run(self, key, given))[1]
        )
        outputs = [compiled(input_ids=ids), compiled(input_ids=ids, return_dict=False)]
        assert list(compiled.compilation.signatures) == known and len(runs) == 2
        assert isinstance(outputs[0].past_key_values, DynamicCache) and outputs[0][CACHE] is outputs[0].past_key_values
        assert isinstance(outputs[1][1], DynamicCache)
        assert list(compiled.compilation.signatures) == known and len(runs) == 2
        assert outputs[0].past_key_values.get_seq_length() == 9
        assert len(compiled.compilation.signatures) == len(known) + 1 and len(runs) == 3
        assert type(outputs[0].past_key_values) is DynamicCache


@pytest.mark.full
def test_training_labels_and_encoders_return_none(adapted_model: Any) -> None:
    ids = prompt(adapted_model, 2)["input_ids"]
    assert adapted_model(input_ids=ids, labels=ids).past_key_values is None
    adapted_model.train()
    try:
        assert adapted_model(input_ids=ids).past_key_values is None
        assert adapted_model(input_ids=ids, use_cache=True).past_key_values is not None
    finally:
        adapted_model.eval()
    for family in ("bert",):
        encoder = graftc.compile({"adapt": [LORA]}, tiny(family)).eval()
        known = list(encoder.compilation.signatures)
        outputs = encoder(torch.randint(5, 50, (2, 6)))
        assert "past_key_values" not in outputs and len(encoder.compilation.signatures) <= len(known) + 1


def test_the_config_decides(source: Any) -> None:
    compiled = graftc.compile({"adapt": [LORA]}, source).eval()
    ids = prompt(source, 2)["input_ids"]
    compiled.config.use_cache = False
    assert compiled(input_ids=ids).past_key_values is None
    compiled.config.use_cache = True
    assert compiled(input_ids=ids).past_key_values is not None
    assert source.config.use_cache


USES: dict[str, Callable[[Any], Any]] = {
    "length": lambda cache: cache.get_seq_length(),
    "layers": lambda cache: len(cache),
    "copy": lambda cache: copy.deepcopy(cache).get_seq_length(),
    "pickle": lambda cache: pickle.loads(pickle.dumps(cache)).get_seq_length(),
    "crop": lambda cache: cache.crop(-2),
    "reorder": lambda cache: cache.reorder_cache(torch.tensor([1, 0])),
    "keys": lambda cache: cache.layers[0].keys,
    "iterate": lambda cache: list(cache),
}


@pytest.mark.sample("length", "pickle")
@pytest.mark.parametrize("use", USES)
def test_every_use_makes_it_what_a_call_with_a_cache_returns(adapted_model: Any, use: str) -> None:
    ids = prompt(adapted_model, 2)["input_ids"]
    with torch.no_grad():
        cache = adapted_model(input_ids=ids).past_key_values
        expected = adapted_model(input_ids=ids, use_cache=True).past_key_values
    assert not hasattr(cache, "to") and "_graftc_make" in vars(cache)
    ours, theirs = USES[use](cache), USES[use](expected)
    if isinstance(ours, int):
        assert ours == theirs
    assert type(cache) is DynamicCache
    for one, other in zip(cache.layers, expected.layers, strict=True):
        assert torch.equal(one.keys, other.keys) and torch.equal(one.values, other.values)


def test_threads_that_look_into_it_at_once() -> None:
    """Both threads find the cache filled, whichever was first."""
    both = Barrier(2, timeout=20)

    def make() -> DynamicCache:
        both.wait()
        cache = DynamicCache()
        cache.update(torch.ones(1, 1, 3, 2), torch.ones(1, 1, 3, 2), 0)
        return cache

    deferred = deferred_cache(False, make)
    with ThreadPoolExecutor(2) as pool:
        lengths = list(pool.map(lambda _: deferred.get_seq_length(), range(2)))
    assert lengths == [3, 3] and type(deferred) is DynamicCache and "_graftc_make" not in vars(deferred)


def test_it_is_of_the_call_that_returned_it(adapted_model: Any) -> None:
    """Disabled adaptations, gradients, inference mode and autocast are those at the time of the call."""
    ids = prompt(adapted_model, 2)["input_ids"]
    ways: dict[str, tuple[Any, ...]] = {
        "off": (adapted_model.disabled(),),
        "inference": (torch.inference_mode(),),
        "autocast": (torch.autocast("cpu", torch.bfloat16), torch.no_grad()),
        "gradients": (torch.enable_grad(),),
    }
    for name, managers in ways.items():
        for manager in managers:
            manager.__enter__()
        cache = adapted_model(input_ids=ids).past_key_values
        expected = adapted_model(input_ids=ids, use_cache=True).past_key_values
        for manager in reversed(managers):
            manager.__exit__(None, None, None)
        keys, own = cache.layers[1].keys, expected.layers[1].keys
        assert keys.dtype == own.dtype and keys.requires_grad == own.requires_grad, name
        assert keys.is_inference() == own.is_inference() and torch.equal(keys, own), name


WRITES: dict[str, Callable[[Any, Tensor], Any]] = {
    "inputs": lambda model, ids: ids.fill_(5),
    "adapter": lambda model, ids: perturb(model, 0.3),
    "added": lambda model, ids: model.add({**LORA, "name": "more"}),
}


@pytest.mark.sample("inputs", "adapter")
@pytest.mark.parametrize("write", WRITES)
def test_what_was_written_to_since_is_refused(source: Any, write: str) -> None:
    compiled = graftc.compile({"adapt": [LORA]}, source).eval()
    ids = prompt(source, 2)["input_ids"]
    cache = compiled(input_ids=ids).past_key_values
    WRITES[write](compiled, ids)
    for _ in range(2):
        with fails("GC140", "has been written to"):
            compiled(input_ids=ids[:, :1], past_key_values=cache)


@pytest.mark.parametrize("chosen", [{"adapter_ids": ["b", "a"]}, {}])
def test_banks(source: Any, chosen: dict[str, Any]) -> None:
    spec = {"adapt": [{**LORA, "name": "a"}, {**LORA, "name": "b"}], "compose": {"bank": ["a", "b"]}}
    compiled = graftc.compile(spec, source).eval()
    perturb(compiled, 0.3)
    ids = prompt(source, 2)["input_ids"]
    with torch.no_grad():
        cache = compiled(input_ids=ids[:, :-1], **chosen).past_key_values
        logits = compiled(input_ids=ids[:, -1:], past_key_values=cache, **chosen).logits
        torch.testing.assert_close(logits[:, -1], compiled(input_ids=ids, **chosen).logits[:, -1], rtol=1e-4, atol=1e-4)
        later = compiled(input_ids=ids).past_key_values
        compiled.activate("b")
        with fails("GC140", "has been written to"):
            later.get_seq_length()


@pytest.mark.full
def test_what_no_cache_can_hold_is_refused_when_it_is_used(source: Any) -> None:
    compiled = graftc.compile({"adapt": [{"method": "prompt", "length": 3}]}, source).eval()
    ids = prompt(source, 2)["input_ids"]
    outputs = compiled(input_ids=ids)
    assert outputs.logits.shape[1] == ids.shape[1]
    with fails("GC141", ""):
        compiled(input_ids=ids[:, :1], past_key_values=outputs.past_key_values)


def test_a_merged_model(adapted_model: Any) -> None:
    merged = adapted_model.merge()
    plain = merged.to_transformers()
    for theirs, ours in zip(*(steps(model, False, plain=False) for model in (plain, merged)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("change", ["mode", "hook"])
def test_a_call_in_another_state_is_refused(source: Any, change: str) -> None:
    """The cache has to be computed in the state in which the outputs were."""
    compiled = graftc.compile({"adapt": [LORA]}, source).eval()
    ids = prompt(source, 2)["input_ids"]
    table = compiled.get_input_embeddings()
    handle = table.register_forward_hook(lambda module, args, output: output * 2) if change == "hook" else None
    with torch.no_grad():
        later = compiled(input_ids=ids).past_key_values
    if handle is None:
        compiled.train()
    else:
        handle.remove()
    with fails("GC140", "first used"):
        later.get_seq_length()


def test_choosing_entries_after_a_call() -> None:
    spec = {"adapt": [{"method": "child_tuning", "variant": "D", "target": {"role": "attn.q"}}]}
    model = tiny("llama")
    compiled = graftc.compile(spec, model).eval()
    ids = prompt(model, 2)["input_ids"]
    with torch.no_grad():
        compiled(input_ids=ids)
    compiled.select([{"input_ids": ids, "labels": ids}])


@pytest.mark.full
def test_on_tensors_without_storage() -> None:
    compiled = graftc.compile({"adapt": [LORA]}, tiny("llama").to("meta")).eval()
    assert compiled(input_ids=torch.ones(2, 5, dtype=torch.int64, device="meta")).logits.is_meta
