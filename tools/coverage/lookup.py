"""What a config says, in it or in one of its parts, and seeded values."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def find(config: Any, *names: str) -> Any:
    """The first of these fields that the config or a config in it has a value for; None where there is none."""
    for name in names:
        value = getattr(config, name, None)
        if value and not hasattr(value, "to_dict"):
            return value
    for value in vars(config).values():
        if hasattr(value, "to_dict") and hasattr(value, "model_type") and (found := find(value, *names)):
            return found
    return None


def number(config: Any, *names: str) -> int:
    """The same where it is a whole number, and 0 where it is anything else."""
    value = find(config, *names)
    return value if isinstance(value, int) else 0


def vocabulary(config: Any) -> int:
    """Tokens that the model knows; 32 where the config does not say."""
    return number(config, "vocab_size", "decoder_vocab_size", "src_vocab_size") or 32


def floats(*shape: int) -> Tensor:
    """Seeded values of a normal distribution."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(2))
