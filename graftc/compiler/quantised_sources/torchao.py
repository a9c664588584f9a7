"""Convert modules whose weights torchao has quantised to tensors with codes and scales, without importing torchao."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from graftc.compat.modules import parameters_of
from graftc.compiler.quantised_sources.packed_modules import plain_linear, with_packed
from graftc.passes.core.packing.affine import Affine
from graftc.passes.core.packing.floating import Floating
from graftc.passes.core.packing.modules import Packed
from graftc.passes.core.packing.packing import PackedType, Packing, as_bytes, via_of
from graftc.specs.errors.diagnostics import GraftError

_WAY_OUT = "quantise it with Int8WeightOnlyConfig or IntxWeightOnlyConfig, or in the spec: base: {quantize: int4}"


def converter(path: str, module: nn.Module) -> Callable[[str, Any, torch.dtype], nn.Module]:
    """Return the function that converts a module with torchao-quantised weights to a plain one.

    Raises:
        GraftError: GC162 for layouts that are specific to a kernel, and for modules with children.
    """
    for name, tensor in parameters_of(module).items():
        if _is_quantised(tensor) and not _is_laid_out(tensor):
            message = f"{path}.{name} is a {type(tensor).__name__} of torchao, whose layout is specific to a kernel"
            raise GraftError("GC162", message, hint=_WAY_OUT)
    if next(module.children(), None) is not None:
        raise GraftError("GC162", f"{path} has both torchao-quantised weights and submodules", hint=_WAY_OUT)
    return _convert


def rounds_inputs(module: nn.Module) -> bool:
    """Return whether the library also rounds the inputs of a module."""
    names = ("act_quant_kwargs", "activation_quantization")
    return any(getattr(tensor, name, None) is not None for tensor in parameters_of(module).values() for name in names)


def _is_quantised(tensor: Any) -> bool:
    return any(cls.__module__.partition(".")[0] == "torchao" for cls in type(tensor).__mro__)


def _is_laid_out(tensor: Any) -> bool:
    """Return whether a tensor has one code per value, in the order of the values, and scales for blocks."""
    codes, scales, block = (getattr(tensor, name, None) for name in ("qdata", "scale", "block_size"))
    return codes is not None and codes.shape == tensor.shape and scales is not None and block is not None


def _convert(path: str, module: Any, dtype: torch.dtype) -> nn.Module:
    packed = {
        name: packed_tensor(f"{path}.{name}", tensor)
        for name, tensor in parameters_of(module).items()
        if _is_quantised(tensor)
    }
    if type(module) is nn.Linear and list(packed) == ["weight"]:
        return plain_linear(module, packed["weight"])
    return with_packed(module, packed)


def packed_tensor(path: str, tensor: Any) -> Packed:
    """Return the packing and the packed parts of a tensor, with the dtype that it reports.

    Raises:
        GraftError: GC162 if the inputs are pre-scaled, or if blocks do not consist of consecutive 8-bit codes.
    """
    data, scale = tensor.qdata.detach(), tensor.scale.detach()
    shape, dtype = tuple(tensor.shape), tensor.dtype
    if getattr(tensor, "act_pre_scale", None) is not None:
        raise GraftError("GC162", f"the inputs of {path} are pre-scaled", hint=_WAY_OUT)
    block = tuple(tensor.block_size)
    block = (*(1 for _ in range(len(shape) - len(block))), *block)
    columns = shape[-1] if block[-1] in (-1, shape[-1]) else block[-1]
    rows = shape[-2] if block[-2] == -1 else block[-2]
    computed_in = torch.promote_types(scale.dtype, dtype)
    if data.dtype == torch.float8_e4m3fn:
        packing: Packing = Floating("e4m3", rows, columns % shape[-1], via=via_of(torch.float32))
        scales = scale.float().reshape(*shape[:-2], -(-shape[-2] // rows), -1)
        return PackedType(packing, shape, dtype), (as_bytes(data, shape), as_bytes(scales))
    if any(size != 1 for size in block[:-1]) or data.dtype not in (torch.int8, torch.uint8):
        raise GraftError("GC162", f"{path} has blocks of {block} {data.dtype} values", hint=_WAY_OUT)
    return _affine(data, scale, tensor.zero_point, shape, dtype, columns % shape[-1], computed_in)


def _affine(
    data: Tensor, scale: Tensor, zero: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype, group: int, via: Any
) -> Packed:
    scales = as_bytes(scale.to(via).reshape(*shape[:-1], -1))
    has_zeros = zero is not None and bool(zero.any())
    packing = Affine("int8z" if has_zeros else "int8", group, via=via_of(via))
    parts: tuple[Tensor, ...] = (data.contiguous().view(torch.uint8), scales)
    if has_zeros:
        assert zero is not None
        parts = (*parts, zero.to(torch.int8).reshape(*shape[:-1], -1).view(torch.uint8))
    return PackedType(packing, shape, dtype), parts
