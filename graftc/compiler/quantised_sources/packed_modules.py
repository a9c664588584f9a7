"""Create plain modules with packed weights."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from torch import nn

import graftc.passes.core.ops.unpack  # noqa: F401 (registers the kinds of packing)
from graftc.compat.modules import parameters_of
from graftc.compiler.resolve.untie import another_handle
from graftc.passes.core.packing.modules import Packed, hold_packed


def plain_linear(like: nn.Module, packed: Packed) -> nn.Linear:
    """Return an `nn.Linear` with a packed weight ``[out, in]``.

    Args:
        like: the module whose bias, if any, and training mode are used.
        packed: the packed weight.
    """
    own, _ = packed
    rows, width = own.shape
    linear = nn.Linear(width, rows, bias=False, device="meta")
    bias = parameters_of(like).get("bias")
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach().to(own.dtype), requires_grad=bias.requires_grad)
    linear.train(like.training)
    hold_packed(linear, {"weight": packed})
    return linear


def with_packed(module: nn.Module, packed: Mapping[str, Packed]) -> nn.Module:
    """Return a copy of a module without submodules, with some parameters packed; other tensors are shared.

    Args:
        module: the module, which is not changed.
        packed: the packed weights, by parameter name.
    """
    copied: Any = copy.copy(module)
    copied.__dict__ = {
        name: copy.copy(value) if name.startswith("_") and isinstance(value, dict | set) else value
        for name, value in module.__dict__.items()
    }
    handles = {name: p if p is None else another_handle(p) for name, p in parameters_of(module).items()}
    parameters_of(copied).update(handles)
    hold_packed(copied, packed)
    return copied  # type: ignore[no-any-return]
