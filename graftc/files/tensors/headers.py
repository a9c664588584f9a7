"""Read headers of safetensors files, strictly and in bounded time. No torch.

A header describes every byte of its file exactly once. Every size and count is checked before the data is read.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from graftc.specs.regular_files import open_regular
from graftc.specs.strict_json import read_json

HEADER_BYTES = 2**25
"""Maximum size of a header, in bytes."""
TENSORS = 2**17
"""Maximum number of tensors in a file."""
NAME, SEGMENTS = 1_000, 100
"""Maximum numbers of characters and of dot-separated segments in a tensor's name."""
AXES = 64
"""Maximum number of axes of a tensor, which is torch's limit for computing with it."""
_WHOLE = 2**63
_VALUES = 16 * TENSORS

ITEM_SIZES: Mapping[str, int] = MappingProxyType(
    {
        **{"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1},
        **{"U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1, "C64": 8},
        **{"F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "F8_E4M3FNUZ": 1, "F8_E5M2FNUZ": 1},
    }
)
"""Bytes per element, for the format's dtypes whose elements are whole bytes."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file.

    Attributes:
        name: its name in the file.
        dtype: its dtype, as the format spells it: ``BF16``, for example.
        shape: its shape.
        start, end: the positions of its bytes, counted from the start of the file.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    def __str__(self) -> str:
        return f"{self.dtype}[{', '.join(map(str, self.shape))}]"


@dataclass(frozen=True)
class Shard:
    """One file of tensors.

    Attributes:
        path: the file.
        size: its size, in bytes.
        metadata: the metadata in its header.
        tensors: its tensors by name, in the order in which they are stored.
    """

    path: Path
    size: int
    metadata: Mapping[str, str]
    tensors: Mapping[str, StoredTensor]

    @property
    def name(self) -> str:
        """The file's name."""
        return self.path.name


def read_shard(path: Path) -> Shard:
    """Read the header of a file.

    Raises:
        ValueError: if it is not a safetensors file, its header does not describe its contents, or it exceeds a limit.
        OSError: if the file cannot be opened or read.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise ValueError("it is not a safetensors file, or its header is truncated")
        if length > HEADER_BYTES:
            raise ValueError(f"its header has {length} bytes, more than {HEADER_BYTES}")
        raw = file.read(length)
    if raw.count(b'"data_offsets"') > TENSORS:
        raise ValueError(f"it has more than {TENSORS:,} tensors")
    data = read_json(raw, HEADER_BYTES, values=_VALUES)
    if not isinstance(data, dict):
        raise ValueError("its header is not a JSON object")
    metadata = data.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("its metadata values are not strings")
    if len(data) > TENSORS:
        raise ValueError(f"it has more than {TENSORS:,} tensors")
    tensors = sorted((_tensor(name, entry, 8 + length) for name, entry in data.items()), key=lambda t: (t.start, t.end))
    at = 8 + length
    for tensor in tensors:
        if tensor.start != at:
            raise ValueError(f"{tensor.name} does not begin where the tensor before it ends")
        at = tensor.end
    if at != size:
        what = "is truncated" if at > size else "contains more data than its header describes"
        raise ValueError(f"it {what}: it has {size} bytes, not {at}")
    return Shard(path, size, metadata, {tensor.name: tensor for tensor in tensors})


def is_tensor_name(name: str) -> bool:
    """Return whether a tensor may have this name; the limits exceed the length and depth of any module path."""
    return len(name) <= NAME and name.count(".") < SEGMENTS


def _tensor(name: str, entry: Any, offset: int) -> StoredTensor:
    if not is_tensor_name(name):
        raise ValueError(f"the tensor name {name[:60]!r}... is too long, or has too many dots")
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{name!r} is not described as a tensor")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_SIZES:
        raise ValueError(f"{name!r} has the unknown dtype {str(dtype)[:40]!r}")
    for numbers in (shape, offsets):
        if not isinstance(numbers, list) or not all(type(n) is int and 0 <= n < _WHOLE for n in numbers):
            raise ValueError(f"{name!r} has sizes that are not non-negative 63-bit integers")
    if len(shape) > AXES:
        raise ValueError(f"{name!r} has {len(shape)} sizes, more than {AXES}")
    if math.prod(filter(None, shape)) * ITEM_SIZES[dtype] >= _WHOLE:
        raise ValueError(f"{name!r} is larger than any memory")
    if len(offsets) != 2 or offsets[1] - offsets[0] != math.prod(shape) * ITEM_SIZES[dtype]:
        raise ValueError(f"{name!r} has a number of bytes that does not match its shape")
    return StoredTensor(name, dtype, tuple(shape), offset + offsets[0], offset + offsets[1])


def header_bytes(tensors: Iterable[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str]) -> bytes:
    """Return the start of a safetensors file, up to the first tensor.

    Args:
        tensors: the name, dtype and shape of each tensor, in the order in which they are to be stored.
        metadata: the metadata of the header.
    """
    data: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    at = 0
    for name, dtype, shape in tensors:
        end = at + math.prod(shape) * ITEM_SIZES[dtype]
        data[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
