"""MXFP4 experts, as in gpt-oss: blocks of 32 4-bit values along the inputs, with exponents as scales."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from graftc.passes.core.packing.floating import Floating
from graftc.passes.core.packing.modules import Packed
from graftc.passes.core.packing.packing import PackedType, via_of
from graftc.runtime.sources.quantised.folder_tensors import FolderTensors, damaged
from graftc.runtime.sources.quantised.weights import Options, StoredWeight

_BLOCK = 32


def weights(tensors: FolderTensors, options: Options) -> Iterator[StoredWeight]:
    """Yield the quantised weights of a folder."""
    for name in tensors.ending("_blocks"):
        yield StoredWeight(name, partial(_read, tensors, name))


def _read(tensors: FolderTensors, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Packed:
    if len(shape) != 3 or shape[1] % _BLOCK:
        damaged(f"{name} is {list(shape)}, which MXFP4 cannot pack in blocks of {_BLOCK}")
    experts, width, rows = shape
    blocks = tensors.get(f"{name}_blocks", torch.uint8, shape=(experts, rows, width // _BLOCK, _BLOCK // 2))
    scales = tensors.get(f"{name}_scales", torch.uint8, shape=(experts, rows, width // _BLOCK))
    packing = Floating("e2m1", 1, _BLOCK, exponents=True, transposed=True, via=via_of(torch.float32))
    return PackedType(packing, shape, dtype), (blocks.flatten(2).contiguous(), scales.contiguous())
