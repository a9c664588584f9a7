"""FP8, as in DeepSeek's checkpoints, and MXFP8.

FP8 has a scale for each block of rows and columns, or one per weight; MXFP8 has a power of two for every 32 values.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from graftc.passes.core.packing.floating import Floating
from graftc.passes.core.packing.modules import Packed
from graftc.passes.core.packing.packing import PackedType, as_bytes, via_of
from graftc.runtime.sources.quantised.folder_tensors import FolderTensors, damaged
from graftc.runtime.sources.quantised.weights import FLOATS, Options, StoredWeight, unread
from graftc.specs.errors.text import shown

_SUFFIXES = (".weight_scale_inv", ".weight_scale")


def weights(tensors: FolderTensors, options: Options) -> Iterator[StoredWeight]:
    """Yield the quantised weights of a folder.

    Raises:
        GraftError: GC161 for formats other than e4m3, or for block sizes that are not a pair.
    """
    block = options.get("weight_block_size")
    if block is not None and not (isinstance(block, list | tuple) and len(block) == 2 and all(map(_is_size, block))):
        unread(f"the quantization_config has weight_block_size: {shown(block)}, which is not a pair of sizes")
    if options.get("fmt", "e4m3") != "e4m3":
        unread(f"FP8 of format {shown(options.get('fmt'))} is not supported", "use e4m3")
    sizes = None if block is None else (block[0], block[1])
    for name in tensors.ending(".weight"):
        if tensors.kind(f"{name}.weight") == "F8_E4M3":
            yield StoredWeight(f"{name}.weight", partial(_read, tensors, name, sizes))
        elif tensors.kind(f"{name}.weight") == "F8_E5M2":
            unread(f"{name}.weight is in e5m2, which is not supported")


def _is_size(size: object) -> bool:
    return type(size) is int and size > 0


def _read(
    tensors: FolderTensors, name: str, block: tuple[int, int] | None, shape: tuple[int, ...], dtype: torch.dtype
) -> Packed:
    codes = tensors.get(f"{name}.weight", torch.float8_e4m3fn, shape=shape)
    suffix = next((suffix for suffix in _SUFFIXES if name + suffix in tensors), _SUFFIXES[0])
    scales = tensors.get(name + suffix, *FLOATS, torch.uint8, torch.float8_e8m0fnu)
    return floating(codes, scales, block, name + suffix, torch.float32, dtype)


def floating(
    codes: Tensor,
    scales: Tensor,
    block: tuple[int, int] | None,
    name: str,
    made_in: torch.dtype,
    dtype: torch.dtype,
) -> Packed:
    """Pack a weight stored in e4m3.

    Args:
        codes: ``[rows, in]``.
        scales: one scale, one per row (``[rows]`` or ``[rows, 1]``), or one per block; integers and e8m0 are exponents.
        block: the block sizes that the scales must match; if None, the weight is divided evenly among the scales.
        name: the name of the scales in errors.
        made_in: the dtype in which values are computed.
        dtype: the weight's dtype.

    Raises:
        GraftError: GC163 if the shape of the scales does not match the weight or its blocks.
    """
    rows, width = codes.shape
    if block is not None:
        if scales.shape != (-(-rows // block[0]), -(-width // block[1])):
            damaged(f"{name} is {list(scales.shape)}, for a weight of {rows} x {width} in blocks of {list(block)}")
        sizes = block
    elif scales.numel() == 1:
        sizes, scales = (0, 0), scales.reshape(1, 1)
    elif scales.shape in ((rows,), (rows, 1)):
        sizes, scales = (1, 0), scales.reshape(rows, 1)
    elif scales.dim() != 2 or rows % scales.shape[0] or width % scales.shape[1]:
        damaged(f"{name} is {list(scales.shape)}, for a weight of {rows} x {width}")
    else:
        sizes = rows // scales.shape[0], width // scales.shape[1]
    exponents = not scales.dtype.is_floating_point or scales.dtype == torch.float8_e8m0fnu
    packing = Floating("e4m3", *sizes, exponents, via=via_of(made_in))
    stored = scales.contiguous().view(torch.uint8) if exponents else as_bytes(scales.to(made_in))
    return PackedType(packing, (rows, width), dtype), (codes.contiguous().view(torch.uint8), stored)
