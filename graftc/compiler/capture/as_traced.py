"""Replace operations in an element's Python code that the tracer cannot follow."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, cast
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from graftc.compat.operators import SAFE_SOFTMAX

_ATTENTION = F.scaled_dot_product_attention
"""torch's own function. During an export, transformers replaces it with a wrapper that chooses a kernel itself."""
_RESTRICTED: ContextVar[bool | None] = ContextVar("restricted to the reference kernel", default=None)
"""Whether the model's code had restricted attention when it called the wrapper; None outside calls to the wrapper."""
_DATA = torch.Tensor.data.__get__  # type: ignore[attr-defined]
_SIZES = {int, torch.SymInt}


class AsTraced(TorchFunctionMode):
    """A function mode that replaces operations in an element's Python code that the tracer cannot follow.

    ``torch.div(x.shape[1], 4, rounding_mode="trunc")`` creates a tensor from a size, whose value the tracer does not
    know; the division is computed on the sizes instead. In whole models, such values are recovered later
    (`graftc.passes.graph.items`), but an element must not read any. ``tensor.data`` becomes ``tensor.detach()``, except
    on parameters, since code that accesses a parameter's data usually writes to it. Attention under
    ``sdpa_kernel(SDPBackend.MATH)`` is written out as that kernel computes it, because a graph does not contain the
    context manager and other kernels round differently.
    """

    def __init__(self) -> None:
        super().__init__()
        self._before = {device: only_math(device) for device in ("cpu", "cuda")}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in (torch.div, torch.floor_divide) and len(args) == 2 and not {*map(type, args)} - _SIZES:
            over, by = args
            rounded = func is torch.floor_divide or kwargs.get("rounding_mode") in ("trunc", "floor")
            if rounded and not {*kwargs} - {"rounding_mode"} and over >= 0 and by > 0:
                return over // by
        if func == _DATA and not isinstance(args[0], nn.Parameter):
            return args[0].detach()
        if func is _ATTENTION:
            device = args[0].device.type if args else kwargs["query"].device.type
            restricted = only_math(device) if (noted := _RESTRICTED.get()) is None else noted
            if restricted and not self._before.get(device, True):
                return math_attention(*args, **kwargs)
        return func(*args, **kwargs)


@contextmanager
def kernels_as_chosen() -> Iterator[None]:
    """Record, for `AsTraced`, whether a model restricts kernels when it calls ``F.scaled_dot_product_attention``.

    During an export, transformers replaces that function with one that chooses other kernels before it calls torch's
    own.
    """
    wrapper = F.scaled_dot_product_attention

    def attention(query: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        token = _RESTRICTED.set(only_math(query.device.type))
        try:
            return wrapper(query, *args, **kwargs)
        finally:
            _RESTRICTED.reset(token)

    with mock.patch.object(F, "scaled_dot_product_attention", attention):
        yield


def only_math(device: str) -> bool:
    """Return whether attention is restricted to its reference kernel on a device type.

    This is the case under ``sdpa_kernel(SDPBackend.MATH)``. A CPU has only one other kernel.
    """
    kernels: Any = torch.backends.cuda
    fused = [kernels.flash_sdp_enabled]
    if device != "cpu":
        fused += [kernels.mem_efficient_sdp_enabled, kernels.cudnn_sdp_enabled]
    return bool(kernels.math_sdp_enabled()) and not any(enabled() for enabled in fused)


def math_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **others: Any,
) -> Tensor:
    """Compute attention with basic operators, bit-identical to the reference kernel of `scaled_dot_product_attention`.

    Arguments and shapes are those of that torch function. Half precision is computed in float32, as in that kernel.
    """
    own, kernels = query.dtype, cast(Any, torch.backends.cuda)
    if own in (torch.float16, torch.bfloat16) and not kernels.fp16_bf16_reduction_math_sdp_allowed():
        query, key, value = query.float(), key.float(), value.float()
    scale = others.get("scale")
    full_scale = 1.0 / math.sqrt(query.shape[-1]) if scale is None else scale
    factor = math.sqrt(abs(full_scale))
    if is_causal:
        attn_mask = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device).tril()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=own).masked_fill(~attn_mask, float("-inf"))
    if others.get("enable_gqa"):
        groups = query.shape[-3]
        key = key.repeat_interleave(groups // key.shape[-3], -3)
        value = value.repeat_interleave(groups // value.shape[-3], -3)
    scores = torch.matmul(query * math.copysign(factor, full_scale), key.transpose(-2, -1) * factor)
    if attn_mask is not None:
        scores = scores + attn_mask
    weights = SAFE_SOFTMAX(scores, -1)
    if dropout_p > 0:
        weights = F.dropout(weights, dropout_p)
    return torch.matmul(weights, value).to(own)
