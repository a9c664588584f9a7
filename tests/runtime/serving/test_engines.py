"""llama.cpp and ONNX Runtime GenAI continue prompts with the tokens that torch finds, from what graftc writes for them.

SmolLM2 and the other engines are in `make serve`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import graftc
from graftc.runtime.serving.running import run_engine
from graftc.testing import perturb

TOKENS = 8
PROMPTS = torch.tensor([[5, 9, 2, 40], [11, 3, 3, 60], [27, 8, 71, 4]])
LORA = {"method": "lora", "rank": 3, "target": {"role": ["attn.q", "attn.k", "attn.v", "ffn.down"]}}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a tiny random Llama with grouped keys, and a byte-level tokenizer, which GGUF files need."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("engines") / "base"
    torch.manual_seed(1)
    sizes = {"vocab_size": 80, "hidden_size": 48, "intermediate_size": 40, "num_hidden_layers": 2, "head_dim": 12}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128, "pad_token_id": 0}
    heads |= {"bos_token_id": 0, "eos_token_id": 1}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads))
    for tensor in model.parameters():  # norms as well, and enough for tokens that vary
        tensor.data += 0.1 * torch.randn_like(tensor)
    model.save_pretrained(folder)
    words = ["<s>", "</s>", "ab", *(chr(33 + number) for number in range(77))]
    tokenizer = Tokenizer(models.BPE({word: number for number, word in enumerate(words)}, [("a", "b")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(
        folder
    )
    return folder


def adapted(base: Path, entry: Mapping[str, Any], seed: int = 0) -> Any:
    model = transformers.LlamaForCausalLM.from_pretrained(base)
    compiled = graftc.compile({"adapt": [dict(entry)]}, model).eval()
    perturb(compiled, 0.3, seed=seed)
    return compiled


def greedy(model: Any) -> tuple[tuple[int, ...], ...]:
    options = {"max_new_tokens": TOKENS, "min_new_tokens": TOKENS, "do_sample": False}
    found = model.generate(input_ids=PROMPTS, attention_mask=torch.ones_like(PROMPTS), **options)
    return tuple(tuple(row) for row in found[:, PROMPTS.shape[1] :].tolist())


def served(engine: str, base: Path, **arguments: Any) -> Sequence[Sequence[int]]:
    prompts = arguments.pop("prompts", PROMPTS.tolist())
    return run_engine(engine, base=base, prompts=prompts, tokens=TOKENS, threads=1, limit=60.0, **arguments).tokens


@pytest.mark.slow
def test_llamacpp(base: Path, tmp_path: Path) -> None:
    """A merged model, and two adapters at once beside prompts without one."""
    compiled, other = adapted(base, LORA), adapted(base, LORA, seed=1)
    plain = greedy(transformers.LlamaForCausalLM.from_pretrained(base))
    wanted, wanted_other = greedy(compiled), greedy(other)
    assert len({plain, wanted, wanted_other}) == 3
    merged = compiled.merge()
    merged.export(tmp_path / "merged.gguf", format="gguf")
    assert served("llama.cpp", tmp_path / "merged.gguf") == greedy(merged.to_transformers()) == wanted

    unchanged = graftc.compile({"adapt": [LORA]}, transformers.LlamaForCausalLM.from_pretrained(base))
    unchanged.merge(allow_unchanged=True).export(tmp_path / "base.gguf", format="gguf")
    files = {"one": tmp_path / "one.gguf", "other": tmp_path / "other.gguf"}
    compiled.export(files["one"], format="gguf")
    other.export(files["other"], format="gguf")
    chosen = ["one"] * 3 + [None] * 3 + ["other"] * 3
    several = served(
        "llama.cpp", tmp_path / "base.gguf", adapters=files, chosen=chosen, prompts=PROMPTS.repeat(3, 1).tolist()
    )
    assert several == wanted + plain + wanted_other


@pytest.mark.full
@pytest.mark.parametrize("entry", [LORA, {"method": "prefix", "length": 3}], ids=["lora", "prefix"])
def test_genai(entry: Mapping[str, Any], base: Path, tmp_path: Path) -> None:
    """The folder for generation is read as it is, whether its adaptation folds or not."""
    compiled = adapted(base, entry)
    compiled.export(tmp_path / "onnx", format="onnx-generate")
    wanted = greedy(compiled)
    assert wanted != greedy(transformers.LlamaForCausalLM.from_pretrained(base))
    assert served("genai", tmp_path / "onnx") == wanted


@pytest.mark.slow
def test_an_adapter_of_another_base_is_refused(base: Path, tmp_path: Path) -> None:
    """The engine's own refusal, or the end of its process, becomes an error with what it printed."""
    unchanged = graftc.compile({"adapt": [LORA]}, transformers.LlamaForCausalLM.from_pretrained(base))
    unchanged.merge(allow_unchanged=True).export(tmp_path / "base.gguf", format="gguf")
    (tmp_path / "adapter.gguf").write_bytes(b"GGUF")
    with pytest.raises(graftc.GraftError) as caught:
        served("llama.cpp", tmp_path / "base.gguf", adapter=tmp_path / "adapter.gguf")
    assert caught.value.code == "GC079"
