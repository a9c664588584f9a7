"""A tiny base that every engine loads, with artifacts of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

import graftc
from graftc.testing import perturb
from tests.applications.serving.peft_folders import changed

TOKENS = 8
PROMPTS = torch.tensor([[5, 9, 2, 40], [11, 3, 3, 60], [27, 8, 71, 4]])

LINEAR: Mapping[str, Any] = {"role": ["attn.q", "attn.v", "ffn.down"]}
METHODS: Mapping[str, Mapping[str, Any]] = {
    "lora": {"adapt": [{"method": "lora", "rank": 3, "target": LINEAR}]},
    "rslora": {"adapt": [{"method": "lora", "rank": 4, "rslora": True, "target": LINEAR}]},
    "pissa": {"adapt": [{"method": "lora", "rank": 3, "init": "pissa", "target": LINEAR}]},
    "dora": {"adapt": [{"method": "dora", "rank": 3, "target": LINEAR}]},
    "adalora": {"adapt": [{"method": "adalora", "target_rank": 2, "total_steps": 10, "target": LINEAR}]},
    "ia3": {"adapt": [{"method": "ia3"}]},
    "loha": {"adapt": [{"method": "loha", "rank": 2, "target": LINEAR}]},
    "vera": {"adapt": [{"method": "vera", "rank": 4, "target": {"role": "attn.q"}}]},
    "bottleneck": {"adapt": [{"method": "pfeiffer", "bottleneck": 4}]},
    "prefix": {"adapt": [{"method": "prefix", "length": 3}]},
    "prompt": {"adapt": [{"method": "prompt", "length": 3}]},
    "rows": {"adapt": [{"method": "rows", "rows": [3, 40], "target": {"role": "embed"}}]},
    "head": {"adapt": [], "train": ["lm_head"]},
    "bitfit": {"adapt": [{"method": "bitfit"}]},
    "spiel": {"adapt": [{"method": "spiel", "density": 0.05, "target": LINEAR}]},
    "head-and-lora": {"adapt": [{"method": "lora", "rank": 3, "target": LINEAR}], "train": ["lm_head"]},
}
"""The specs of artifacts, by name."""


def base_folder(folder: Path, **changes: Any) -> Path:
    """Write a random Llama with grouped keys and biases, and a byte-level tokenizer, which GGUF files need."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    torch.manual_seed(1)
    sizes = {"vocab_size": 80, "hidden_size": 48, "intermediate_size": 40, "num_hidden_layers": 2, "head_dim": 12}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128, "pad_token_id": 0}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**sizes, **heads, **changes}))
    for tensor in model.parameters():  # norms as well, and enough for tokens that vary
        tensor.data += 0.1 * torch.randn_like(tensor)
    model.lm_head.weight.data[1:3] = 0  # engines that answer at full length never choose what ends a text
    model.save_pretrained(folder)
    changed(folder, "config.json", rope_theta=10000.0)
    words = ["<s>", "</s>", *(chr(33 + number) for number in range(77)), '!"']
    tokenizer = Tokenizer(models.BPE({word: number for number, word in enumerate(words)}, [("!", '"')]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(folder)
    return folder


def loaded(base: Path) -> Any:
    """Return the base."""
    return transformers.LlamaForCausalLM.from_pretrained(base)


def artifact(base: Path, method: str, folder: Path) -> Any:
    """Write an artifact with random values in place of training, and return its model."""
    compiled = graftc.compile(dict(METHODS[method]), loaded(base)).eval()
    perturb(compiled, 0.3)
    compiled.save(folder, certify=False)
    return compiled


def greedy(model: Any) -> Sequence[Sequence[int]]:
    """Return the tokens with which a model continues the prompts."""
    ids = PROMPTS
    with torch.no_grad():
        for _ in range(TOKENS):
            ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(-1)], 1)
    return tuple(tuple(row) for row in ids[:, PROMPTS.shape[1] :].tolist())
