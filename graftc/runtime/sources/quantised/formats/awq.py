"""AWQ (Lin et al., "AWQ: Activation-aware Weight Quantization", 2023, arXiv:2306.00978).

As packed by AutoAWQ for ``gemm``: codes and zero points run along the outputs, and each group of eight is permuted.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from graftc.passes.core.packing.modules import Packed
from graftc.runtime.sources.quantised.folder_tensors import FolderTensors, damaged
from graftc.runtime.sources.quantised.unpack_words import fields
from graftc.runtime.sources.quantised.weights import FLOATS, Options, StoredWeight, affine, unread, whole_number
from graftc.specs.errors.text import shown

PLACES = (0, 4, 1, 5, 2, 6, 3, 7)
"""The position of each of eight outputs within a word."""

_BITS = 4


def weights(tensors: FolderTensors, options: Options) -> Iterator[StoredWeight]:
    """Yield the quantised weights of a folder.

    Raises:
        GraftError: GC161 for packings other than ``gemm``, or for codes that do not have 4 bits.
    """
    layout = str(options.get("version") or options.get("format") or "gemm").lower()
    if layout != "gemm":
        unread(f"the AWQ packing {shown(layout)} is specific to a kernel", "use a checkpoint of version gemm")
    if whole_number(options, "bits", options.get("w_bit", _BITS)) != _BITS:
        unread(f"AWQ has {_BITS} bits")
    group = whole_number(options, "group_size", options.get("q_group_size", 128))
    for name in tensors.ending(".qweight"):
        yield StoredWeight(f"{name}.weight", partial(_read, tensors, name, group))


def _read(tensors: FolderTensors, name: str, group: int, shape: tuple[int, ...], dtype: torch.dtype) -> Packed:
    rows, width = shape
    group = width if group <= 0 else group
    if rows % len(PLACES) or width % group:
        damaged(f"{name} is {rows} x {width}, which AWQ cannot pack in eights, in groups of {group}")
    words = tensors.get(f"{name}.qweight", torch.int32, shape=(width, rows // len(PLACES)))
    packed = tensors.get(f"{name}.qzeros", torch.int32, shape=(width // group, rows // len(PLACES)))
    scales = tensors.get(f"{name}.scales", *FLOATS, shape=(width // group, rows))
    return affine(_in_order(words, rows).T, scales.T, _in_order(packed, rows).T, _BITS, group, None, dtype)


def _in_order(words: Tensor, rows: int) -> Tensor:
    eights = fields(words, _BITS, rows).reshape(len(words), -1, len(PLACES))
    return eights[..., list(PLACES)].flatten(1)
