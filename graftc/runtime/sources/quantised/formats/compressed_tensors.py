"""compressed-tensors, as written by llm-compressor: integers in words or bytes, and FP8."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from graftc.passes.core.packing.modules import Packed
from graftc.runtime.sources.quantised.folder_tensors import FolderTensors, damaged
from graftc.runtime.sources.quantised.formats.fp8 import floating
from graftc.runtime.sources.quantised.unpack_words import fields, words_for
from graftc.runtime.sources.quantised.weights import FLOATS, Options, StoredWeight, affine, order_of, unread
from graftc.specs.errors.text import shown

_LAYOUTS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "mixed-precision", "dense")
_MIDDLE = 128


def weights(tensors: FolderTensors, options: Options) -> Iterator[StoredWeight]:
    """Yield the quantised weights of a folder.

    Raises:
        GraftError: GC161 for other layouts or bit widths, for sparse weights, or for transforms.
    """
    groups = options.get("config_groups")
    if not isinstance(groups, Mapping) or not all(isinstance(group, Mapping) for group in groups.values()):
        unread("the quantization_config has no config_groups")
    for layout in (options.get("format"), *(group.get("format") for group in groups.values())):
        if layout is not None and layout not in _LAYOUTS:
            unread(
                f"the compressed-tensors format {shown(layout)} is not supported", f"use one of {', '.join(_LAYOUTS)}"
            )
    sparse = options.get("sparsity_config") or {}
    if sparse and sparse.get("format", "dense") != "dense":
        unread(f"the weights are also sparse: {shown(sparse.get('format'))}")
    if (options.get("transform_config") or {}).get("config_groups"):
        unread("activations are transformed before the quantised weights, which is not supported")
    widths = {bits for group in groups.values() if (bits := (group.get("weights") or {}).get("num_bits")) is not None}
    if not all(type(bits) is int and 1 <= bits <= 8 for bits in widths):
        unread(f"weights of {shown(sorted(map(str, widths)))} bits are not supported", "use 1 to 8 bits")
    blocks = [block for group in groups.values() if (block := _block(group.get("weights") or {})) is not None]
    for name in tensors.ending(".weight_packed"):
        yield StoredWeight(f"{name}.weight", partial(_read_words, tensors, name, sorted(widths)))
    for name in tensors.ending(".weight_scale"):
        if f"{name}.weight" not in tensors:
            continue
        if tensors.kind(f"{name}.weight") == "F8_E4M3":
            yield StoredWeight(f"{name}.weight", partial(_read_floats, tensors, name, blocks))
        elif tensors.kind(f"{name}.weight") == "I8":
            yield StoredWeight(f"{name}.weight", partial(_read_bytes, tensors, name))


def _block(weights: Mapping[str, Any]) -> tuple[int, int] | None:
    sizes = weights.get("block_structure")
    if not (isinstance(sizes, list) and len(sizes) == 2 and all(type(size) is int and size > 0 for size in sizes)):
        return None
    return sizes[0], sizes[1]


def _read_words(
    tensors: FolderTensors, name: str, widths: list[int], shape: tuple[int, ...], dtype: torch.dtype
) -> Packed:
    rows, width = shape
    tensors.require_sizes(f"{name}.weight_shape", shape)
    words = tensors.get(f"{name}.weight_packed", torch.int32, shape=(rows, None))
    bits = next((bits for bits in widths if words.shape[1] == words_for(width, bits)), None)
    if bits is None:
        damaged(f"{name}.weight_packed has {words.shape[1]} words for {width} inputs of {widths} bits")
    scales, count, group = _scales(tensors, name, rows, width)
    if f"{name}.weight_zero_point" in tensors:
        packed = tensors.get(f"{name}.weight_zero_point", torch.int32, shape=(words_for(rows, bits), count))
        zeros = fields(packed.T, bits, rows).T
    else:
        zeros = torch.full((rows, count), 1 << (bits - 1), dtype=torch.uint8)
    codes = fields(words, bits, width)
    if 4 < bits < 8:
        codes, zeros = codes + (_MIDDLE - (1 << (bits - 1))), zeros + (_MIDDLE - (1 << (bits - 1)))
    return affine(codes, scales, zeros, bits, group, _order(tensors, name, width, group, count), dtype)


def _read_bytes(tensors: FolderTensors, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Packed:
    rows, width = shape
    codes = tensors.get(f"{name}.weight", torch.int8, shape=shape)
    scales, count, group = _scales(tensors, name, rows, width)
    zeros = torch.zeros(rows, count, dtype=torch.int8)
    if f"{name}.weight_zero_point" in tensors:
        stored = tensors.get(f"{name}.weight_zero_point", torch.int8)
        if stored.numel() not in (1, rows * count):
            damaged(f"{name}.weight_zero_point is {list(stored.shape)}, for {rows} x {count} scales")
        zeros = zeros + stored.reshape(-1, count if stored.numel() > 1 else 1)
    order = _order(tensors, name, width, group, count)
    unsigned, shifted = (part.view(torch.uint8) ^ _MIDDLE for part in (codes.contiguous(), zeros.contiguous()))
    return affine(unsigned, scales, shifted, 8, group, order, dtype)


def _read_floats(
    tensors: FolderTensors, name: str, blocks: list[tuple[int, int]], shape: tuple[int, ...], dtype: torch.dtype
) -> Packed:
    codes = tensors.get(f"{name}.weight", torch.float8_e4m3fn, shape=shape)
    scales = tensors.get(f"{name}.weight_scale", *FLOATS)
    alike = [block for block in blocks if scales.shape == (-(-shape[0] // block[0]), -(-shape[1] // block[1]))]
    block = alike[0] if alike and scales.numel() > 1 else None
    return floating(codes, scales, block, f"{name}.weight_scale", scales.dtype, dtype)


def _scales(tensors: FolderTensors, name: str, rows: int, width: int) -> tuple[Tensor, int, int]:
    """Return the scales ``[rows, groups]``, the number of groups per row, and the number of inputs per group."""
    scales = tensors.get(f"{name}.weight_scale", *FLOATS)
    if scales.numel() == 1:
        scales = scales.reshape(1, 1).expand(rows, 1)
    elif scales.dim() == 1:
        scales = scales.unsqueeze(1)
    if scales.dim() != 2 or scales.shape[0] != rows or not scales.shape[1] or width % scales.shape[1]:
        damaged(f"{name}.weight_scale is {list(scales.shape)}, for a weight of {rows} x {width}")
    return scales, scales.shape[1], width // scales.shape[1]


def _order(tensors: FolderTensors, name: str, width: int, group: int, count: int) -> Tensor | None:
    if f"{name}.weight_g_idx" not in tensors:
        return None
    index = tensors.get(f"{name}.weight_g_idx", torch.int32, torch.int64, shape=(width,))
    if bool((index == -1).all()):
        return None
    return order_of(index, f"{name}.weight_g_idx", group, count)
