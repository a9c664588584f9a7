"""Prefixes and virtual tokens as the first contents of a cache, compared with the whole text and with a plain model."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import DynamicCache

import graftc
from graftc.runtime.compiled import Compiled
from graftc.testing.perturbing import perturb
from tests.kit.language_models import language_model, prompt
from tests.parity import test_peft_prefix as parity
from tests.runtime.model.test_threads import at_once

SOME: dict[str, Any] = {"max_new_tokens": 16, "min_new_tokens": 16}

LENGTH = 5


def in_front(source: Any, method: str, **fields: Any) -> Compiled:
    """A model with a prefix or with virtual tokens, perturbed."""
    compiled = graftc.compile({"adapt": [{"method": method, "length": LENGTH, **fields}]}, source).eval()
    perturb(compiled, 0.5)
    return compiled


def as_cache(prefixed: Compiled, rows: int) -> DynamicCache:
    """Return a cache with the keys and values of a prefix, as peft would fill it."""
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
    """Prefixes and virtual tokens come first in a cache, and every step gives the tokens of the whole text."""

    @pytest.mark.full
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
        tokens = prefixed.generate(**given, **options)
        assert torch.equal(tokens, expected)
        assert not torch.equal(tokens, base.generate(**given, **options))
        assert torch.equal(tokens, prefixed.generate(**given, **options, use_cache=False))

    @pytest.mark.full
    def test_peft_step_by_step(self, base: Any) -> None:
        """peft's `generate` loses the prefix with this version of transformers; its forward of whole texts has it."""
        layers, heads, width = parity.sizes(base.config)
        theirs = parity.of_peft(base, "CAUSAL_LM", layers, heads, width)
        table = torch.randn(parity.LENGTH, layers * 2 * heads * width, generator=torch.Generator().manual_seed(6))
        ids = prompt(base, 3)["input_ids"]
        given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        with torch.no_grad():
            theirs.prompt_encoder["default"].embedding.weight.copy_(table)
            ours = parity.prefixed(base, table)
            for _ in range(32):
                logits = theirs(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, -1]
                ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
        tokens = ours.generate(**given, max_new_tokens=32, eos_token_id=None)
        assert torch.equal(tokens, ids)
        assert not torch.equal(tokens, base.generate(**given, max_new_tokens=32, eos_token_id=None))

    @pytest.mark.full
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
        tokens = prefixed.generate(**given, **SOME, **ways[0])
        assert torch.equal(tokens, prefixed.generate(**given, **SOME, **ways[1], use_cache=False))

    @pytest.mark.sample("llama")
    @pytest.mark.slow
    def test_embeddings(self, base: Any, prefixed: Any) -> None:
        given = prompt(base, 3, padded=True)
        embeds = base.get_input_embeddings()(given["input_ids"])
        tokens = prefixed.generate(inputs_embeds=embeds, attention_mask=given["attention_mask"], **SOME)
        assert torch.equal(tokens, prefixed.generate(**given, **SOME)[:, 9:])

    @pytest.mark.full
    def test_virtual_tokens(self, base: Any) -> None:
        prompted = in_front(base, "prompt")
        given = prompt(base, 3, padded=True)
        tokens = prompted.generate(**given, **SOME)
        assert torch.equal(tokens, prompted.generate(**given, **SOME, use_cache=False))
        assert not torch.equal(tokens, base.generate(**given, **SOME))

    @pytest.mark.full
    def test_threads(self, base: Any, prefixed: Any) -> None:
        """First calls of a model run at once: an adaptation that one thread leaves out stays active in others."""
        fresh = graftc.compile(prefixed.spec, base).eval()
        fresh.load_adapter_state_dict(prefixed.adapter_state_dict())
        given = prompt(base, 3, padded=True)
        jobs: list[Callable[[Compiled], Any]] = [
            lambda model: model.generate(**given, **SOME),
            lambda model: model(**given).logits[given["attention_mask"].bool()],
            lambda model: model.generate(**prompt(base, 2, seed=8), **SOME, num_beams=2),
        ]
        expected = [job(prefixed) for job in jobs]
        for result, own in zip(at_once(*(lambda job=job: job(fresh) for job in jobs)), expected, strict=True):
            torch.testing.assert_close(result, own)

    @pytest.mark.slow
    def test_copies(self, base: Any, prefixed: Any) -> None:
        given = prompt(base, 2)
        expected = prefixed.generate(**given, **SOME)
        copied = copy.deepcopy(prefixed)
        assert torch.equal(copied.generate(**given, **SOME), expected)
        perturb(copied, 0.5)
        assert not torch.equal(copied.generate(**given, **SOME), expected)
        assert torch.equal(prefixed.generate(**given, **SOME), expected)


@pytest.mark.slow
def test_a_compiled_assistant(base: Any, prefixed: Any) -> None:
    """The assistant's prefix comes first in its own cache, in every round."""
    given = prompt(base, 1)
    merged = graftc.compile({"adapt": [{"method": "lora", "rank": 2, "target": {"role": "attn.q"}}]}, base).eval()
    tokens = merged.generate(**given, **SOME, assistant_model=prefixed)
    assert torch.equal(tokens, merged.generate(**given, **SOME))


@pytest.mark.full
def test_calls_beside_the_loop(base: Any, prefixed: Any) -> None:
    """Guidance calls the model with its own cache, which does not yet begin with the prefix."""
    given = prompt(base, 1)
    guided = prefixed.generate(**given, **SOME, guidance_scale=1.5)
    assert torch.equal(guided, prefixed.generate(**given, **SOME, guidance_scale=1.5, use_cache=False))
