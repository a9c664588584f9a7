"""Generation in torch compared with the source model's own `generate` and with the folded model's, token by token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import graftc
from graftc.testing.perturbing import perturb
from tests.cli.support import run_warm
from tests.kit.language_models import FAMILIES, language_model, prompt
from tests.kit.warm import output

pytestmark = pytest.mark.gate

TOKENS = 64
SPEC = {"adapt": [{"method": "lora", "rank": 2, "target": {"role": ["attn.q", "attn.v"]}}]}
WAYS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "greedy": ({}, {}),
    "beams": ({"rows": 2}, {"num_beams": 4}),
    "sampled": ({"rows": 3}, {"do_sample": True, "top_k": 20, "temperature": 1.3}),
    "padded": ({"rows": 5, "padded": True}, {}),
    "static": ({"rows": 3, "padded": True}, {"cache_implementation": "static"}),
}


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    """A model and its compiled form with LoRA as initialised, which computes the model's own function."""
    model = language_model(request.param)
    return model, graftc.compile(SPEC, model).eval()


def generated(model: Any, way: str) -> Tensor:
    """Return what a model generates, ``[rows, tokens]``; texts do not end early."""
    of_prompt, options = WAYS[way]
    given = prompt(model, **of_prompt)
    torch.manual_seed(5)
    outputs = model.generate(**given, max_new_tokens=TOKENS, min_new_tokens=TOKENS, **options)
    return outputs if isinstance(outputs, Tensor) else outputs["sequences"]


@pytest.mark.parametrize("way", WAYS)
def test_what_the_source_generates(pair: tuple[Any, Any], way: str) -> None:
    model, compiled = pair
    expected = generated(model, way)
    assert expected.shape[1] >= TOKENS and len(expected[0].unique()) > 8, "texts that repeat themselves show nothing"
    assert torch.equal(generated(compiled, way), expected)
    assert len(compiled.compilation.signatures) <= (6 if model.config.is_encoder_decoder else 4)


def test_what_is_folded_generates_the_same(pair: tuple[Any, Any]) -> None:
    """The trained compiled model, the merged model, and the merged model as a transformers model generate the same."""
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


_AGAIN = """
import sys, torch, graftc
given, expected = torch.load(sys.argv[2])
compiled = graftc.load(sys.argv[1]).eval()
table = compiled.compilation.table
known = len(compiled.compilation.signatures) + len(table.stored)
found = compiled.generate(**given, max_new_tokens=TOKENS, min_new_tokens=TOKENS)
signatures = compiled.compilation.signatures
same = len(signatures) + len(table.stored) == known
print(torch.equal(found, expected), same, all(found.cached for found in signatures.values()))
"""


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_an_artifact_generates_in_another_process(family: str, tmp_path: Path) -> None:
    """An artifact generates the same tokens from its graphs, and so does the merged model as a transformers folder."""
    import transformers

    language_model(family).save_pretrained(tmp_path / "base")
    auto = transformers.AutoModelForCausalLM if family == "llama" else transformers.AutoModelForSeq2SeqLM
    compiled = graftc.compile(SPEC, auto.from_pretrained(tmp_path / "base")).eval()
    perturb(compiled, 0.3)
    given = prompt(compiled, 3, padded=True)
    expected = compiled.generate(**given, max_new_tokens=TOKENS, min_new_tokens=TOKENS)
    place = compiled.save(tmp_path / "artifact")
    torch.save((given, expected), tmp_path / "expected")
    code = _AGAIN.replace("TOKENS", str(TOKENS))
    (tmp_path / "empty").mkdir()
    seen = output(code, str(place), str(tmp_path / "expected"), GRAFTC_CACHE=str(tmp_path / "empty"))
    assert seen.split() == ["True"] * 3, "tokens, signatures, captures"
    for command in ("verify", "inspect"):
        assert run_warm(command, str(place), cwd=tmp_path).status == 0, command
    compiled.merge().save(tmp_path / "merged")
    plain = auto.from_pretrained(tmp_path / "merged")
    assert torch.equal(plain.generate(**given, max_new_tokens=TOKENS, min_new_tokens=TOKENS), expected)
