"""Convert the 4-bit (`Linear4bit`) and 8-bit (`Linear8bitLt`) linear maps of bitsandbytes, without importing it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from graftc.compiler.quantised_sources.packed_modules import plain_linear
from graftc.passes.core.packing.blockwise import SCALES, Blockwise, dynamic_values, table_of
from graftc.passes.core.packing.packing import VIA, PackedType, as_bytes, via_of
from graftc.passes.core.packing.row_scaled import RowScaled
from graftc.specs.errors.diagnostics import GraftError

_ANEW = "reload the model, and compile it before calling it"


def converter(path: str, module: nn.Module) -> Callable[[str, Any, torch.dtype], nn.Module]:
    """Return the function that converts one of the library's linear maps to a plain one.

    Raises:
        GraftError: GC162 for a module that is not a linear map.
    """
    names = {cls.__name__ for cls in type(module).__mro__}
    if "Linear4bit" in names:
        return linear_4bit
    if "Linear8bitLt" in names:
        return linear_8bit
    hint = "exclude it from quantisation: llm_int8_skip_modules in BitsAndBytesConfig"
    raise GraftError("GC162", f"{path} is a {type(module).__name__} of bitsandbytes, not a linear map", hint=hint)


def linear_4bit(path: str, module: Any, dtype: torch.dtype) -> nn.Module:
    """Return an `nn.Linear` with the codes of a `Linear4bit`.

    Args:
        path: the module's path, used in errors.
        module: the library's module.
        dtype: the dtype of the new weight. As in the library, values are computed and rounded in the dtype that the
            weight had before quantisation.

    Raises:
        GraftError: GC162 if the module is not quantised yet, or has an unknown layout or code table.
    """
    weight = module.weight
    state = getattr(weight, "quant_state", None) or getattr(module, "quant_state", None)
    if state is None:
        raise GraftError("GC162", f"{path} is not quantised yet", hint="move the model to its device first: model.to")
    if getattr(state, "packing_format_for_cpu", False):
        message = f"the scales of {path} were rounded for a CPU kernel when it was called in eval mode"
        raise GraftError("GC162", message, hint=_ANEW)
    return plain_linear(module, packed_4bit(path, weight.detach(), state, dtype))


def packed_4bit(path: str, weight: Tensor, state: Any, dtype: torch.dtype) -> tuple[PackedType, tuple[Tensor, ...]]:
    """Return the packing and the packed parts of a 4-bit weight.

    Args:
        path: the module's path, used in errors.
        weight: the weight's codes, in any dtype.
        state: the library's ``QuantState``, or an object with its attributes.
        dtype: the dtype of the weight.

    Raises:
        GraftError: GC162 for an unknown layout or code table, GC163 for tensors whose sizes do not match.
    """
    kind, inner = state.quant_type, state.state2 if state.nested else None
    known = kind in Blockwise.KINDS and state.dtype in VIA and len(state.shape) == 2
    if known and state.code is not None:
        known = torch.equal(state.code.cpu().float(), table_of(kind))
    if known and inner is not None:
        known = inner.blocksize == SCALES and torch.equal(inner.code.cpu().float(), dynamic_values())
    if not known:
        raise GraftError("GC162", f"{path} has an unknown layout or code table", hint=_ANEW)
    rows, width = state.shape
    packing = Blockwise(kind, state.blocksize, inner is not None, via=via_of(state.dtype))
    parts = [as_bytes(weight).reshape(-1, 1)]
    blocks = -(-rows * width // state.blocksize)
    if inner is None:
        parts.append(as_bytes(state.absmax.float(), (blocks, 4)) if state.absmax.numel() == blocks else parts[0][:0])
    else:
        outer = -(-blocks // SCALES)
        fits = state.absmax.numel() == blocks and inner.absmax.numel() == outer
        parts.append(as_bytes(state.absmax, (blocks, 1)) if fits else parts[0][:0])
        parts.append(as_bytes(inner.absmax.float()).reshape(-1, 4))
        parts.append(as_bytes(state.offset.float()))
    if parts[0].numel() != -(-rows * width // 2) or not parts[1].numel():
        message = (
            f"{path} is {rows} x {width}, but has {parts[0].numel()} bytes of codes and {state.absmax.numel()} scales"
        )
        raise GraftError("GC163", message, hint="download the checkpoint again")
    return PackedType(packing, (rows, width), dtype), tuple(parts)


def linear_8bit(path: str, module: Any, dtype: torch.dtype) -> nn.Module:
    """Return an `nn.Linear` with the codes of a `Linear8bitLt`.

    Unlike the library's map, it does not round its inputs to 8 bits.

    Raises:
        GraftError: GC162 if the module is not quantised.
    """
    weight = module.weight
    codes = getattr(weight, "CB", None)
    scales = getattr(weight, "SCB", None)
    if codes is None or scales is None:
        codes, scales = module.state.CB, module.state.SCB
    if codes is None:
        codes = weight
    if scales is None or codes.dtype != torch.int8:
        hint = "load it with has_fp16_weights=False, which is what transformers does"
        raise GraftError("GC162", f"{path} is not quantised: its weights are {weight.dtype}", hint=hint)
    return plain_linear(module, packed_8bit(path, codes.detach(), scales, dtype))


def packed_8bit(path: str, codes: Tensor, scales: Tensor, dtype: torch.dtype) -> tuple[PackedType, tuple[Tensor, ...]]:
    """Return the packing and packed parts of an 8-bit weight: codes ``int8[rows, in]``, and scales ``float32[rows]``.

    Raises:
        GraftError: GC163 for tensors whose sizes do not match.
    """
    if codes.dim() != 2 or scales.numel() != codes.shape[0]:
        message = f"{path} has codes of shape {list(codes.shape)}, but {scales.numel()} scales"
        raise GraftError("GC163", message, hint="download the checkpoint again")
    parts = codes.contiguous().view(torch.uint8), as_bytes(scales.float(), (codes.shape[0], 4))
    return PackedType(RowScaled("int8_rows"), tuple(codes.shape), dtype), parts
