"""HQQ, as in ``HQQLinear.state_dict``: codes, with each weight's options beside them."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from graftc.passes.core.packing.affine import halves
from graftc.passes.core.packing.half_quadratic import HalfQuadratic
from graftc.passes.core.packing.modules import Packed
from graftc.passes.core.packing.packing import PackedType, as_bytes, via_of
from graftc.runtime.sources.quantised.folder_tensors import FolderTensors, damaged
from graftc.runtime.sources.quantised.weights import FLOATS, Options, StoredWeight, unread
from graftc.specs.errors.text import shown

_PACKINGS = {"8bit_u8": 8, "4bit_u8": 4, "2bit_u8": 2, "1bit_u8": 1}
_TYPES = {str(dtype): dtype for dtype in FLOATS}


def weights(tensors: FolderTensors, options: Options) -> Iterator[StoredWeight]:
    """Yield the quantised weights of a folder."""
    for name in tensors.ending(".W_q"):
        yield StoredWeight(f"{name}.weight", partial(_read, tensors, name))


def _read(tensors: FolderTensors, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Packed:
    rows, width = shape
    tensors.require_sizes(f"{name}.shape", shape)
    for part in ("scale", "zero"):
        if f"{name}.quant_{part}" in tensors and _number(tensors, f"{name}.quant_{part}"):
            unread(f"the {part}s of {name} are also quantised, which is not supported")
    layout, made_in = _text(tensors, f"{name}.packing"), _TYPES.get(_text(tensors, f"{name}.compute_dtype"))
    if layout not in _PACKINGS or made_in is None:
        unread(f"the HQQ packing {shown(layout)} of {name} is not supported", f"use one of {', '.join(_PACKINGS)}")
    bits = _PACKINGS[layout]
    group = _number(tensors, f"{name}.group_size") if f"{name}.group_size" in tensors else 0
    axis = _number(tensors, f"{name}.axis")
    size = group or (width if axis else rows)
    if size <= 0 or rows * width % size or axis not in (0, 1):
        damaged(f"{name} is {rows} x {width}, which cannot be divided into groups of {size}")
    count = rows * width // size
    grouped = (count, size) if axis else (size, count)
    words = tensors.get(f"{name}.W_q")
    words = words.contiguous().view(torch.uint8) if words.dtype != torch.uint8 else words
    if grouped[0] * bits % 8 or words.shape != (grouped[0] * bits // 8, grouped[1]):
        damaged(f"{name}.W_q is {list(words.shape)} bytes, for {grouped[0]} x {grouped[1]} codes of {bits} bits")
    codes = _unpacked(words, bits).reshape(rows, width)
    each = (count, 1) if axis else (1, count)
    scales, zeros = (tensors.get(f"{name}.{part}", *FLOATS, shape=each).to(made_in) for part in ("scale", "zero"))
    packing = HalfQuadratic("hqq8" if bits == 8 else "hqq4", group, axis == 0, via=via_of(made_in))
    parts = (codes if bits == 8 else halves(codes), *(as_bytes(part.reshape(-1, 1)) for part in (scales, zeros)))
    return PackedType(packing, (rows, width), dtype), tuple(part.contiguous() for part in parts)


def _unpacked(words: Tensor, bits: int) -> Tensor:
    """Return the codes in the stored bytes.

    Each byte holds one code from each of ``8 / bits`` parts of the rows, with the first part in the highest bits.
    """
    return torch.cat([(words >> shift) & (2**bits - 1) for shift in range(8 - bits, -1, -bits)])


def _number(tensors: FolderTensors, name: str) -> int:
    tensor = tensors.get(name)
    if tensor.numel() != 1 or tensor.is_floating_point():
        damaged(f"{name} is not an integer")
    return int(tensor)


def _text(tensors: FolderTensors, name: str) -> str:
    tensor = tensors.get(name, torch.uint8)
    if tensor.dim() != 1 or tensor.numel() > 64:
        damaged(f"{name} is not a short text")
    return bytes(tensor.tolist()).decode("latin-1")
