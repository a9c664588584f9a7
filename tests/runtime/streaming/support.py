"""Small sharded checkpoints, adapters for them, and readers of their files."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from graftc.runtime.sources.models import load_model, quiet_transformers
from graftc.testing import perturb, tiny

PROJECTIONS = ["q_proj", "v_proj", "down_proj"]


def sharded_base(folder: Path, family: str = "llama", dtype: torch.dtype = torch.bfloat16) -> Path:
    """Write a tiny model to several files."""
    with quiet_transformers():
        tiny(family).to(dtype).save_pretrained(folder, max_shard_size="30KB")
    return folder


def peft_adapter(folder: Path, base: Path, config: Any, scale: float = 0.1) -> Any:
    """Write an adapter of peft's with random values; return the model with it."""
    import peft

    with quiet_transformers(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(load_model(str(base)), config)
        perturb(model, scale)  # type: ignore[arg-type]
        model.save_pretrained(folder)
    return model


def written_lora(folder: Path, base: Path, rank: int = 4, **changes: Any) -> Path:
    """Write a LoRA in peft's format for some projections of a Llama, without any model."""
    stored = tensors(base)
    rng = torch.Generator().manual_seed(1)
    factors: dict[str, Tensor] = {}
    for name, weight in stored.items():
        module = name.removesuffix(".weight")
        if module.rpartition(".")[2] in PROJECTIONS:
            rows, columns = weight.shape
            factors[f"base_model.model.{module}.lora_A.weight"] = torch.randn(rank, columns, generator=rng)
            factors[f"base_model.model.{module}.lora_B.weight"] = 0.1 * torch.randn(rows, rank, generator=rng)
    config = {
        **{"peft_type": "LORA", "r": rank, "lora_alpha": 8, "target_modules": PROJECTIONS, "bias": "none"},
        **{"base_model_name_or_path": str(base), "task_type": "CAUSAL_LM", "inference_mode": True, **changes},
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_file(factors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def edit_adapter(folder: Path, change: Any) -> None:
    """Change the tensors of a peft folder."""
    stored = tensors(folder)
    change(stored)
    save_file(stored, folder / "adapter_model.safetensors")


def tensors(folder: Path) -> dict[str, Tensor]:
    """Return every tensor in a folder's files."""
    stored: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(str(file), "pt") as opened:
            stored |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - no mapping
    return stored


def exact_lora(base: Tensor, adapter: dict[str, Tensor], module: str, scaling: float) -> Tensor:
    """Compute ``W + s B A`` in float64."""
    a, b = (adapter[f"base_model.model.{module}.lora_{side}.weight"].double() for side in "AB")
    return base.double() + scaling * (b @ a)
