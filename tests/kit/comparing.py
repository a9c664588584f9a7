"""Tensors of models by name, their gradients, and comparisons of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from graftc.testing.compare import flat, largest_difference


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that train, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def gradients_of(model: nn.Module) -> dict[str, Tensor]:
    """Return copies of the gradients of all parameters that have one, by name."""
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def floats(outputs: Any) -> list[Tensor]:
    """Return every floating-point tensor of a model's output, in order."""
    return [leaf for leaf in flat(outputs) if leaf.is_floating_point()]


def same_tensors(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    """Return whether two mappings have the same names and equal tensors."""
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def same_adapters(one: Any, other: Any) -> bool:
    """Return whether two compiled models have the same adapter tensors."""
    return same_tensors(one.adapter_state_dict(), other.adapter_state_dict())


def relative_difference(actual: list[Tensor], expected: list[Tensor]) -> float:
    """Return the largest difference relative to the largest expected number, or to 1 if all are smaller.

    The rounding of products depends on the processor.
    """
    return largest_difference(actual, expected) / max(1.0, *(float(t.abs().max()) for t in expected))


def every_tensor(model: nn.Module) -> dict[str, Tensor]:
    """Return parameters and buffers by each of their names."""
    named = (model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False))
    return {name: tensor for tensors in named for name, tensor in tensors}
