"""Lookups in a config and its parts, and seeded values."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def find(config: Any, *names: str) -> Any:
    """Return the value of the first of these fields that the config or a config in it has; None if there is none."""
    for name in names:
        value = getattr(config, name, None)
        if value and not hasattr(value, "to_dict"):
            return value
    for value in vars(config).values():
        if hasattr(value, "to_dict") and hasattr(value, "model_type") and (inner := find(value, *names)):
            return inner
    return None


def number(config: Any, *names: str) -> int:
    """Return the same value if it is an integer, otherwise 0."""
    value = find(config, *names)
    return value if isinstance(value, int) else 0


def vocabulary(config: Any) -> int:
    """Return the number of tokens that the model knows; 32 if the config does not say."""
    return number(config, "vocab_size", "decoder_vocab_size", "src_vocab_size") or 32


def floats(*shape: int) -> Tensor:
    """Return seeded values of a normal distribution."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(2))
