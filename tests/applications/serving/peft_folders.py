"""A small base with a tied head, and PEFT folders for it whose factors are noise."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from graftc.files.tensors.folder import TensorFolder
from tests.runtime.interop.adapters import written


def saved_base(folder: Path, **changes: Any) -> Path:
    """Write a LLaMA of two layers with a tied head, whose config has the field that mistral.rs needs."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    LlamaForCausalLM(LlamaConfig(**{**sizes, **heads, "tie_word_embeddings": True, **changes})).save_pretrained(folder)
    return changed(folder, "config.json", rope_theta=10000.0)


def peft_folder(base: Path, folder: Path, seed: int = 0, **options: Any) -> Path:
    """Write an adapter of rank 4 and alpha 6 for q and v, with factors of noise, which names its base."""
    from transformers import LlamaForCausalLM

    options = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"], **options}
    written(LlamaForCausalLM.from_pretrained(base), folder, seed, **options)
    changed(folder, base_model_name_or_path=str(base))
    return folder


def changed(folder: Path, name: str = "adapter_config.json", **fields: Any) -> Path:
    """Change fields of a folder's config."""
    file = folder / name
    file.write_text(json.dumps({**json.loads(file.read_text(encoding="utf-8")), **fields}), encoding="utf-8")
    return folder


def shapes_of(base: Path) -> dict[str, tuple[int, int]]:
    """Return the shapes of the weights of a base's linear maps in layers, by module."""
    entries = TensorFolder(base).entries
    own = {name.removesuffix(".weight"): stored.shape for name, stored in entries.items() if ".layers." in name}
    return {path: (shape[0], shape[1]) for path, shape in own.items() if len(shape) == 2}
