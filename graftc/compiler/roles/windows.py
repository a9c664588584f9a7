"""Detect layers of a transformers model that see only the last tokens of a text."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def has_windows(config: Any) -> bool:
    """Return whether any layer's cache would drop tokens that have left a sliding window."""
    from transformers.cache_utils import DynamicCache

    return any(getattr(layer, "is_sliding", False) for layer in DynamicCache(config=config).layers)


def may_have_windows(model: nn.Module) -> bool:
    """Return whether a layer may hide the first token from the last through its cache or a stored mask (as in GPT-Neo).

    True if the model has no transformers config from which this can be determined.
    """
    from transformers import PreTrainedConfig

    config = getattr(model, "config", None)
    return not isinstance(config, PreTrainedConfig) or has_windows(config) or any(map(_hides_first, model.buffers()))


def _hides_first(mask: torch.Tensor) -> bool:
    square = mask.dtype == torch.bool and mask.dim() > 1 and mask.shape[-1] == mask.shape[-2] > 0
    return square and (mask.is_meta or not bool(mask[..., -1, 0].all()))
