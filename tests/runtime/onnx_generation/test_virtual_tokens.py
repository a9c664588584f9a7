"""Graphs for generation of models with virtual tokens in front of the text: a prefix takes their place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import graftc
from graftc.runtime.model.runner import runner_of
from graftc.runtime.onnx_generation import load
from graftc.runtime.onnx_generation.prefixed import prefixed
from graftc.testing import perturb
from tests.runtime.onnx_generation.onnx_folders import VOCABULARY, source

PROMPT = {"method": "prompt", "length": 3}
LORA = {"method": "lora", "rank": 2, "target": {"role": ["attn.q", "attn.v"]}}
IDS = torch.arange(2 * 5).reshape(2, 5) * 7 % (VOCABULARY - 3) + 3
MASK = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])


def adapted(family: str, *adapt: dict[str, Any]) -> Any:
    compiled = graftc.compile({"adapt": list(adapt)}, source(family)).eval()
    perturb(compiled, 0.5)
    return compiled


@pytest.mark.full
@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
def test_texts_are_those_of_torch(family: str, tmp_path: Path) -> None:
    """With padding on the left, beside a LoRA that acts on the tokens as well, and from a model in train mode."""
    compiled = adapted(family, PROMPT, LORA)
    options: dict[str, Any] = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
    given = {"input_ids": IDS, "attention_mask": MASK}
    expected = compiled.generate(**given, **options)
    compiled.train()
    compiled.export(tmp_path / "folder", format="onnx-generate")
    assert compiled.training
    model = load(tmp_path / "folder", threads=1)
    assert torch.equal(model.generate(**given, **options), expected)
    with compiled.eval().disabled("prompt"):
        assert not torch.equal(compiled.generate(**given, **options), expected)


@pytest.mark.full
def test_the_prefix_computes_the_same_in_float64() -> None:
    compiled = graftc.compile({"adapt": [LORA, PROMPT]}, source("llama").double()).eval()
    perturb(compiled, 0.5)
    other = prefixed(runner_of(compiled))
    assert [own.method for own in other.spec.adapt] == ["lora", "prefix"]
    with torch.no_grad():
        expected, actual = (model(input_ids=IDS).logits for model in (compiled, other.module))
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)
    assert [own.method for own in runner_of(compiled).spec.adapt] == ["lora", "prompt"]


@pytest.mark.full
def test_the_largest_position_is_within_the_table_behind_a_prefix(tmp_path: Path) -> None:
    """The samples with which files are checked leave room for the prefix in a table of learned positions."""
    compiled = adapted("gpt2", {"method": "prefix", "length": 60, "positions": "shifted"})
    compiled.export(tmp_path / "folder", format="onnx-generate")
    expected = compiled.generate(IDS, max_new_tokens=6, do_sample=False)
    assert torch.equal(load(tmp_path / "folder", threads=1).generate(IDS, max_new_tokens=6, do_sample=False), expected)


@pytest.mark.slow
@pytest.mark.parametrize("inputs", [{}, pytest.param({"inputs": ["lora"]}, marks=pytest.mark.full)])
def test_what_no_prefix_can_replace(inputs: dict[str, Any], tmp_path: Path) -> None:
    """Tokens between others see the text; those beside adaptations that are inputs are not known when it is written."""
    compiled = adapted("llama", LORA, PROMPT if inputs else {"method": "pre_embed", "length": 2, "infix": 2})
    with pytest.raises(graftc.GraftError) as caught:
        compiled.export(tmp_path / "folder", format="onnx-generate", **inputs)
    assert caught.value.code == "GC141" and not list(tmp_path.iterdir())
