"""A cache contains the keys and values of a text, and may be cropped, reordered, copied and continued."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

import graftc
from tests.kit.language_models import language_model, prompt
from tests.kit.models import adapted
from tests.kit.releases import needs, needs_one_graph
from tests.runtime.onnx_generation.onnx_toy import fails

pytestmark = pytest.mark.slow

SOME: dict[str, Any] = {"max_new_tokens": 6, "min_new_tokens": 6, "return_dict_in_generate": True}
ADAPTED: dict[str, dict[str, Any]] = {
    "lora": {"method": "lora", "rank": 2, "target": {"role": ["attn.q", "attn.v"]}},
    "unshifted": {"method": "prefix", "length": 4, "positions": "unshifted"},
    "shifted": {"method": "prefix", "length": 4, "positions": "shifted"},
    "masked": {"method": "prefix", "length": 4, "positions": "shifted", "window": "masked"},
    "visible": {"method": "prefix", "length": 4, "positions": "shifted", "window": "visible"},
    "prompt": {"method": "prompt", "length": 4},
}
CASES = [
    f"{family} {kind}"
    for family, kinds in {
        "llama": ("shifted", "unshifted", "prompt", "lora"),
        "gpt2": ("unshifted", "shifted", "prompt"),
        "mistral": ("masked", "unshifted", "visible", "prompt"),
        "gemma3": ("masked", "prompt"),
        "falcon": ("shifted",),
    }.items()
    for kind in kinds
]


@pytest.fixture(scope="module", params=CASES)
def adapted_model(request: pytest.FixtureRequest) -> Any:
    family, kind = request.param.split()
    needs_one_graph(family)
    return adapted(language_model(family), ADAPTED[kind], noise=0.5)


def virtual(compiled: Any) -> bool:
    return bool(compiled.spec.adapt[0].virtual_tokens())


def last(compiled: Any, ids: Tensor) -> Tensor:
    """Return the logits of the last token, computed from the whole text without a cache."""
    with torch.no_grad():
        return compiled(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[:, -1]


def goes_on(compiled: Any, text: Tensor, cache: Any) -> None:
    """Check that continuing a text from a cache of its first tokens gives the same as without a cache."""
    expected = compiled.generate(text, attention_mask=torch.ones_like(text), **{**SOME, "use_cache": False})
    outputs = compiled.generate(text, attention_mask=torch.ones_like(text), past_key_values=cache, **SOME)
    assert torch.equal(outputs.sequences, expected.sequences)
    assert outputs.past_key_values is cache and cache.get_seq_length() == outputs.sequences.shape[1] - 1
    assert type(cache) is DynamicCache


CHANGES: dict[str, Callable[[Any, Tensor], tuple[Any, Tensor]]] = {
    "as it is": lambda cache, text: (cache, text),
    "cropped": lambda cache, text: (cache.crop(-3), (cache, text[:, :-3]))[1],
    "cropped into the prompt": lambda cache, text: (cache.crop(-11), (cache, text[:, :-11]))[1],
    "reordered": lambda cache, text: (cache.reorder_cache(torch.tensor([1, 1, 0])), (cache, text[[1, 1, 0]]))[1],
    "repeated": lambda cache, text: (cache.batch_repeat_interleave(2), (cache, text.repeat_interleave(2, 0)))[1],
    "selected": lambda cache, text: (cache.batch_select_indices(torch.tensor([2])), (cache, text[2:]))[1],
    "copied": lambda cache, text: (copy.deepcopy(cache), text),
    "pickled": lambda cache, text: (pickle.loads(pickle.dumps(cache)), text),
}


@pytest.mark.sample("llama shifted-reordered")
@pytest.mark.parametrize("change", CHANGES)
def test_what_generate_returned(adapted_model: Any, change: str) -> None:
    ids = prompt(adapted_model, 3)["input_ids"]
    first = adapted_model.generate(ids, attention_mask=torch.ones_like(ids), **SOME)
    cache, text = CHANGES[change](first.past_key_values, first.sequences)
    assert cache.get_seq_length() == text.shape[1] - 1 and cache.layers[0].keys.shape[2] == text.shape[1] - 1
    more = torch.cat([text, torch.full((len(text), 2), 7)], 1)
    if virtual(adapted_model):
        with fails("GC141", "virtual tokens"):
            adapted_model(input_ids=more[:, cache.get_seq_length() :], past_key_values=cache)
    else:
        with torch.no_grad():
            copied = copy.deepcopy(cache)
            outputs = adapted_model(input_ids=more[:, cache.get_seq_length() :], past_key_values=copied)
        torch.testing.assert_close(outputs.logits[:, -1], last(adapted_model, more), rtol=1e-4, atol=1e-4)
        assert outputs.past_key_values is copied and copied.get_seq_length() == more.shape[1]
    goes_on(adapted_model, more, cache)


@pytest.mark.sample("llama shifted")
def test_what_a_call_returned(adapted_model: Any) -> None:
    ids = prompt(adapted_model, 2)["input_ids"]
    if virtual(adapted_model):
        with fails("GC141", "virtual tokens"):
            adapted_model(input_ids=ids, use_cache=True)
        return
    with torch.no_grad():
        cache = adapted_model(input_ids=ids, use_cache=True).past_key_values
    goes_on(adapted_model, torch.cat([ids, ids[:, :2]], 1), cache)


@pytest.mark.sample("llama shifted")
def test_a_cache_is_filled_in_place_and_gone_on_from_twice(adapted_model: Any) -> None:
    text, cache = prompt(adapted_model, 2)["input_ids"], DynamicCache()
    for _ in range(2):
        text = adapted_model.generate(text, attention_mask=torch.ones_like(text), cache=cache, **SOME).sequences
        assert cache.get_seq_length() == text.shape[1] - 1 and type(cache) is DynamicCache
        text = torch.cat([text, torch.full((2, 1), 9)], 1)
    goes_on(adapted_model, text, cache)


@pytest.mark.sample("llama shifted")
def test_a_loop_that_fails_leaves_the_text(adapted_model: Any) -> None:
    """After a failed loop, nothing is left in front of the text, which continues from where it was."""

    def failing(ids: Tensor, scores: Tensor) -> Tensor:
        if ids.shape[1] > 11:
            raise KeyboardInterrupt
        return scores

    ids, cache = prompt(adapted_model, 2)["input_ids"], DynamicCache()
    given = {"attention_mask": torch.ones_like(ids), "cache": cache, "logits_processor": [failing]}
    with pytest.raises(KeyboardInterrupt):
        adapted_model.generate(ids, **given, **SOME)
    assert type(cache) is DynamicCache
    known = cache.get_seq_length()
    assert known == 12
    text = adapted_model.generate(ids, attention_mask=torch.ones_like(ids), **SOME).sequences
    goes_on(adapted_model, text[:, : known + 1], cache)


@pytest.mark.sample("llama shifted")
def test_beams(adapted_model: Any) -> None:
    ids = prompt(adapted_model, 2)["input_ids"]
    options = {"num_beams": 3, "num_return_sequences": 3, **SOME}
    outputs = adapted_model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    plain = adapted_model.generate(ids, attention_mask=torch.ones_like(ids), **{**options, "use_cache": False})
    assert torch.equal(outputs.sequences, plain.sequences)
    text = outputs.sequences
    assert outputs.past_key_values.get_seq_length() == text.shape[1] - 1


@pytest.mark.sample("llama shifted")
def test_a_generation_without_a_cache_by_the_models_own_config(adapted_model: Any) -> None:
    ids = prompt(adapted_model, 2)["input_ids"]
    expected = adapted_model.generate(ids, attention_mask=torch.ones_like(ids), **SOME).sequences
    adapted_model.generation_config.use_cache = False
    try:
        sequences = adapted_model.generate(ids, attention_mask=torch.ones_like(ids), **SOME).sequences
    finally:
        adapted_model.generation_config.use_cache = True
    assert torch.equal(sequences, expected)


PENALTIES: dict[str, dict[str, Any]] = {
    "repetition": {"repetition_penalty": 1.4},
    "n-grams": {"no_repeat_ngram_size": 2},
    "bad words": {"bad_words_ids": [[7], [9, 11]]},
    "biased": {"sequence_bias": {(5,): 3.0, (7, 9): -4.0}},
    "chunks": {"prefill_chunk_size": 4},
}


@pytest.mark.sample("llama shifted-repetition", "llama shifted-chunks")
@pytest.mark.parametrize("name", PENALTIES)
def test_logits_processors_see_the_text_and_its_mask(adapted_model: Any, name: str) -> None:
    """Processors compare texts token by token and ignore padding, with a cache as without one."""
    given = prompt(adapted_model, 3, padded=True)
    options = {**SOME, **PENALTIES[name], "output_logits": True, "output_scores": True}
    outputs = adapted_model.generate(**given, **options)
    plain = {key: value for key, value in options.items() if key != "prefill_chunk_size"}
    expected = adapted_model.generate(**given, **plain, use_cache=False)
    assert torch.equal(outputs.sequences, expected.sequences)
    largest = float(torch.stack(expected.logits).abs().max())
    for ours, theirs in ((outputs.logits, expected.logits), (outputs.scores, expected.scores)):
        torch.testing.assert_close(torch.stack(ours), torch.stack(theirs), rtol=1e-4, atol=1e-4 * largest)


@pytest.mark.sample("llama shifted")
def test_padding_is_not_penalised(adapted_model: Any) -> None:
    needs("transformers", "5.23", "earlier ones penalise the tokens of padding as well")
    given = prompt(adapted_model, 3, padded=True)
    padded = (given["attention_mask"] == 0).any(1) & ~(given["input_ids"] * given["attention_mask"] == 0).all(1)
    options = {**SOME, "max_new_tokens": 1, "min_new_tokens": 1, "output_logits": True, "output_scores": True}
    outputs = adapted_model.generate(**given, **options, repetition_penalty=1.4)
    assert bool(padded.any())
    assert torch.equal(outputs.scores[0][padded, 0], outputs.logits[0][padded, 0])


def test_a_text_that_begins_elsewhere_is_refused() -> None:
    """Tokens after such a text would get other positions than they should."""
    spec = {"adapt": [{**ADAPTED["shifted"], "name": "front"}]}
    compiled = graftc.compile(spec, language_model("llama")).eval()
    text = prompt(compiled, 2)["input_ids"]
    outputs = compiled.generate(text, attention_mask=torch.ones_like(text), **SOME)
    with compiled.disabled():
        plain = compiled.generate(text, attention_mask=torch.ones_like(text), **SOME)
        with fails("GC140", "begins at position 4, but the call's text begins at 0"):
            compiled.generate(outputs.sequences, past_key_values=outputs.past_key_values, **SOME)
        with fails("GC140", "begins at position 4, but the call's text begins at 0"):
            compiled(input_ids=text[:, :1], past_key_values=copy.deepcopy(outputs.past_key_values))
    for call in (compiled.generate, compiled):
        with fails("GC140", "begins at position 0, but the call's text begins at 4"):
            call(plain.sequences, past_key_values=plain.past_key_values)


@pytest.mark.full
@pytest.mark.sample("2")
@pytest.mark.parametrize("kept", [2, 3])
def test_a_call_whose_graph_is_for_one_length_fills_a_cache(kept: int) -> None:
    """The number of kept logits is decided in Python, which fixes the length of the text in the graph."""
    model = language_model("llama").eval()
    compiled = graftc.compile({"adapt": [ADAPTED["lora"]]}, model).eval()  # LoRA starts as the base model
    text = prompt(model, 2)["input_ids"]
    results = []
    with torch.no_grad():
        for each in (compiled, model):
            first = each(input_ids=text[:, :7], use_cache=True, logits_to_keep=kept)
            assert first.past_key_values.get_seq_length() == 7
            then = each(input_ids=text[:, 7:], past_key_values=first.past_key_values)
            results.append((first.logits, then.logits))
    assert all(torch.allclose(ours, theirs, atol=1e-5) for ours, theirs in zip(*results, strict=True))
