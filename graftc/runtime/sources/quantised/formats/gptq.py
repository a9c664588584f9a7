"""GPTQ, as written by AutoGPTQ and GPTQModel: codes packed along the inputs, zero points along the outputs."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from graftc.passes.core.packing.modules import Packed
from graftc.runtime.sources.quantised.folder_tensors import FolderTensors, damaged
from graftc.runtime.sources.quantised.unpack_words import fields, words_for
from graftc.runtime.sources.quantised.weights import (
    FLOATS,
    Options,
    StoredWeight,
    affine,
    order_of,
    unread,
    whole_number,
)
from graftc.specs.errors.text import shown

_BITS = (2, 3, 4, 8)
_LESS_ONE = "gptq"
"""The older layout, in which zero points are stored reduced by one."""


def weights(tensors: FolderTensors, options: Options) -> Iterator[StoredWeight]:
    """Yield the quantised weights of a folder.

    Raises:
        GraftError: GC161 for layouts that are specific to a kernel, or for bit widths other than 2, 3, 4 and 8.
    """
    bits = whole_number(options, "bits")
    layout = options.get("checkpoint_format") or options.get("format") or _LESS_ONE
    if bits not in _BITS:
        unread(f"GPTQ of {shown(bits)} bits is not supported", "use 2, 3, 4 or 8 bits")
    if layout not in (_LESS_ONE, "gptq_v2"):
        unread(f"the GPTQ layout {shown(layout)} is specific to a kernel", "use a checkpoint_format of gptq")
    group, before = whole_number(options, "group_size", 128), 1 if layout == _LESS_ONE else 0
    for name in tensors.ending(".qweight"):
        yield StoredWeight(f"{name}.weight", partial(_read, tensors, name, bits, group, before))


def _read(
    tensors: FolderTensors, name: str, bits: int, group: int, before: int, shape: tuple[int, ...], dtype: torch.dtype
) -> Packed:
    rows, width = shape
    group = width if group <= 0 else group
    count = -(-width // group)
    words = tensors.get(f"{name}.qweight", torch.int32, shape=(words_for(width, bits), rows))
    scales = tensors.get(f"{name}.scales", *FLOATS, shape=(count, rows))
    packed = tensors.get(f"{name}.qzeros", torch.int32, shape=(count, None))
    if packed.shape[1] < words_for(rows, bits):
        damaged(f"{name}.qzeros has {packed.shape[1]} words for {rows} zero points of {bits} bits")
    zeros = (fields(packed, bits, rows) + before) & (2**bits - 1)
    order = None
    if f"{name}.g_idx" in tensors:
        index = tensors.get(f"{name}.g_idx", torch.int32, torch.int64, shape=(width,))
        order = order_of(index, f"{name}.g_idx", group, count)
    return affine(fields(words.T, bits, width), scales.T, zeros.T, bits, group, order, dtype)
