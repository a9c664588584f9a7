"""Adapter folders written by PEFT, with random tensors, for the tests of layouts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from graftc.testing import perturb, tiny


def phi3() -> nn.Module:
    """Return a decoder whose projections are fused."""
    from transformers import Phi3Config, Phi3ForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 2, "vocab_size": 50}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0}
    return Phi3ForCausalLM(Phi3Config(**sizes, **heads)).eval()


def base(name: str) -> nn.Module:
    """Return a tiny model of a family."""
    return phi3() if name == "phi3" else tiny(name).eval()


def config_of(model: Any, path: Path) -> Path:
    """Write only the config of a model to a folder and return the folder."""
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(path)
    return path


def with_noise(model: nn.Module, config: Any, noise: float = 0.1, seed: int = 0) -> Any:
    """Put peft's adapters into a model, move every trained tensor away from its initial value, and return it."""
    import warnings

    from peft import get_peft_model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted: Any = get_peft_model(model, config)  # type: ignore[arg-type]
    perturb(adapted, noise, seed)
    return adapted.eval()


def written(model: nn.Module, path: Path, seed: int = 0, **config: Any) -> Path:
    """Write a folder with a random LoRA of a model and return it."""
    import copy

    from peft import LoraConfig, get_peft_model

    options = {"r": 3, "lora_alpha": 7, "task_type": "CAUSAL_LM", **config}
    adapted = get_peft_model(copy.deepcopy(model), LoraConfig(**options))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in adapted.named_parameters():
            if "lora_" in name:
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.2)
    adapted.save_pretrained(path)
    return path


def outputs(model: nn.Module, adapter: Path | None, ids: torch.Tensor | None = None) -> torch.Tensor:
    """Return the logits of a model, with an adapter that PEFT must load without a warning."""
    import copy
    import warnings

    from peft import PeftModel

    if ids is None:
        ids = torch.arange(12).reshape(2, 6) % 50
    if adapter is None:
        with torch.no_grad():
            return model(input_ids=ids).logits
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        loaded = PeftModel.from_pretrained(copy.deepcopy(model), adapter).eval()
    with torch.no_grad():
        logits: torch.Tensor = loaded(input_ids=ids).logits
    return logits
