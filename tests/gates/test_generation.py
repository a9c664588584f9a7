"""Generating in torch beside the source model's own `generate` and the folded one's, token by token."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import graftc
from graftc.testing.perturb import perturb
from tests.language_models import FAMILIES, language_model, prompt

pytestmark = pytest.mark.gate

TOKENS = 64
SPEC = {"adapt": [{"method": "lora", "rank": 2, "target": {"role": ["attn.q", "attn.v"]}}]}
WAYS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "greedy": ({}, {}),
    "beams": ({"rows": 2}, {"num_beams": 4}),
    "sampled": ({"rows": 3}, {"do_sample": True, "top_k": 20, "temperature": 1.3}),
    "padded": ({"rows": 5, "padded": True}, {}),
}


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    """A model and the same compiled, with LoRA as it begins: the model's own function."""
    model = language_model(request.param)
    return model, graftc.compile(SPEC, model).eval()


def generated(model: Any, way: str) -> Tensor:
    """What a model generates, ``[rows, tokens]``; texts do not end before their time."""
    of_prompt, options = WAYS[way]
    given = prompt(model, **of_prompt)
    torch.manual_seed(5)
    found = model.generate(**given, max_new_tokens=TOKENS, min_new_tokens=TOKENS, **options)
    return found if isinstance(found, Tensor) else found["sequences"]


@pytest.mark.parametrize("way", WAYS)
def test_what_the_source_generates(pair: tuple[Any, Any], way: str) -> None:
    model, compiled = pair
    expected = generated(model, way)
    assert expected.shape[1] >= TOKENS and len(expected[0].unique()) > 8, "texts that repeat themselves show nothing"
    assert torch.equal(generated(compiled, way), expected)
    assert len(compiled.compilation.signatures) <= (4 if model.config.is_encoder_decoder else 3)


def test_what_is_folded_generates_the_same(pair: tuple[Any, Any]) -> None:
    """Compiled and trained, merged, and the merged model as one of transformers."""
    model, compiled = pair
    identity = {way: generated(compiled, way) for way in WAYS}
    perturb(compiled, 0.3)
    merged = compiled.merge()
    plain = merged.to_transformers()
    assert type(plain) is type(model)
    for way in WAYS:
        expected = generated(plain, way)
        assert not torch.equal(expected, identity[way]), "the adaptation changes no token"
        assert torch.equal(generated(compiled, way), expected), way
        assert torch.equal(generated(merged, way), expected), way
