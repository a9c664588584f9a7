"""Generation over ONNX Runtime compared with the source model's own `generate`, token by token."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from graftc.runtime.onnx_generation import load
from tests.runtime.onnx_generation import onnx_toy as toy
from tests.runtime.onnx_generation.onnx_folders import VOCABULARY, adapted_source

pytestmark = pytest.mark.gate


@pytest.fixture(scope="module", params=["llama", "qwen3", "gpt2", "t5"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """A merged transformers model and its graphs in ONNX Runtime."""
    merged = adapted_source(request.param).merge()
    folder = merged.export(tmp_path_factory.mktemp("onnx") / request.param, "onnx-generate", logits="all")
    return merged.to_transformers(), load(folder, threads=1)


def prompts(rows: int = 5, length: int = 9) -> dict[str, torch.Tensor]:
    """Return rows with padding on the left, one token more in each."""
    ids = torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(1))
    mask = (torch.arange(length) >= torch.arange(rows)[:, None]).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


def both(pair: tuple[Any, Any], inputs: dict[str, torch.Tensor], **options: Any) -> torch.Tensor:
    """Return what both models generate, and check that it is the same."""
    generated = []
    for model in pair:
        torch.manual_seed(3)
        generated.append(model.generate(**inputs, **options))
    assert torch.equal(*generated), options
    varied = len(inputs["input_ids"]) == 1 or len(generated[0].unique()) > 6
    assert varied, "models that repeat themselves show nothing"
    return generated[0]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"min_new_tokens": 64},
        {"num_beams": 4, "num_return_sequences": 2, "length_penalty": 0.5},
        {"do_sample": True, "top_k": 20, "temperature": 1.3, "num_return_sequences": 2},
        {"do_sample": True, "num_beams": 3},
        {"repetition_penalty": 1.3, "no_repeat_ngram_size": 3},
    ],
    ids=["greedy", "long", "beams", "sample", "sampled-beams", "processors"],
)
def test_the_same_tokens(pair: tuple[Any, Any], options: dict[str, Any]) -> None:
    both(pair, prompts(), **{"max_new_tokens": options.get("min_new_tokens", 40), **options})
    both(pair, prompts(1, 5), **{"max_new_tokens": 64, **options})


def test_several_tokens_at_once(pair: tuple[Any, Any]) -> None:
    """Candidates are checked together, and rejected ones are removed from the cache."""
    graphs = pair[1]
    row = prompts(1, 7)
    expected = both(pair, row, max_new_tokens=40)
    assert torch.equal(both(pair, row, max_new_tokens=40, prompt_lookup_num_tokens=3), expected)
    assert torch.equal(graphs.generate(**row, max_new_tokens=40, assistant_model=graphs), expected)
    assert torch.equal(both(pair, row, max_new_tokens=40, use_cache=False), expected)
    if graphs._seq2seq:
        return  # transformers splits the encoder's mask into chunks as well
    assert torch.equal(
        both(pair, prompts(3), max_new_tokens=20, prefill_chunk_size=4), both(pair, prompts(3), max_new_tokens=20)
    )


def test_logits(pair: tuple[Any, Any]) -> None:
    """The logits of every step agree within float32's rounding."""
    first, second = (
        model.generate(**prompts(), max_new_tokens=12, return_dict_in_generate=True, output_logits=True).logits
        for model in pair
    )
    torch.testing.assert_close(torch.stack(second), torch.stack(first), rtol=1e-4, atol=1e-4)


def test_no_torch_model_is_loaded(tmp_path: Path) -> None:
    """Neither a model's code nor graftc's compiler is imported, and importing graftc imports none of it."""
    folder = toy.write(tmp_path / "toy")
    code = f"""
import sys, graftc, graftc.runtime.onnx_generation as generate
assert not {{"torch", "transformers", "onnxruntime"}} & set(sys.modules)
model = generate.load({str(folder)!r}, threads=1)
print(model.generate(max_new_tokens=3, do_sample=False, eos_token_id=None).tolist())
found = [m for m in sys.modules if ".modeling_" in m and m.startswith("transformers.models.")]
assert not [m for m in found if not m.startswith("transformers.models.auto")], found
folder = "graftc.passes.core.weights"
names = ["graftc.passes", "graftc.passes.core", folder, folder + ".names", folder + ".sharding"]
ours = [m for m in sys.modules if m.startswith(("graftc.compiler", "graftc.passes"))]
assert sorted(ours) == names, ours  # tensors' names, which inputs for adapters have
"""
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
    assert json.loads(process.stdout) == toy.greedy(torch.tensor([[1]]), torch.tensor([[1]]), 3).tolist()
