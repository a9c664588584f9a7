"""Access to a file's tensors in place: mapped into memory, so that the system reads and writes only what is used."""

from __future__ import annotations

import mmap
import os
from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from graftc.files.tensors.headers import Shard, StoredTensor
from graftc.specs.regular_files import open_regular

DTYPES: Mapping[str, torch.dtype] = MappingProxyType(
    {
        **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
        **{"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8},
        **{"U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16},
        **{"U8": torch.uint8, "BOOL": torch.bool, "C64": torch.complex64},
        **{"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu},
        **{"F8_E4M3FNUZ": torch.float8_e4m3fnuz, "F8_E5M2FNUZ": torch.float8_e5m2fnuz},
    }
)
"""The format's dtypes that torch supports."""


class MappedFile:
    """A file that is mapped into memory.

    Args:
        shard: the header of the file.
        writable: whether writing to tensors changes the file; if not, writing changes private copies and should be
            avoided.

    Raises:
        ValueError: if the size of the file has changed since its header was read.
        OSError: if the file cannot be opened or mapped.
    """

    def __init__(self, shard: Shard, *, writable: bool = False) -> None:
        self._writable, access = writable, mmap.ACCESS_WRITE if writable else mmap.ACCESS_COPY
        with shard.path.open("r+b") if writable else open_regular(shard.path) as file:
            if os.fstat(file.fileno()).st_size != shard.size:
                raise ValueError("it has changed since its header was read")
            self._map = mmap.mmap(file.fileno(), 0, access=access)

    def tensor(self, stored: StoredTensor) -> Tensor:
        """Return a tensor in place, or a copy if it is read-only and not aligned for its dtype."""
        dtype = DTYPES[stored.dtype]
        if stored.end == stored.start:
            return torch.empty(stored.shape, dtype=dtype)
        raw = self.raw(stored)
        if raw.data_ptr() % dtype.itemsize and not self._writable:
            raw = raw.clone()
        return raw.view(dtype).view(stored.shape)

    def raw(self, stored: StoredTensor) -> Tensor:
        """Return the bytes of a tensor, ``uint8``."""
        count = stored.end - stored.start
        if not count:
            return torch.empty(0, dtype=torch.uint8)
        return torch.frombuffer(self._map, dtype=torch.uint8, count=count, offset=stored.start)

    def flush(self) -> None:
        """Flush changes to tensors to disk."""
        self._map.flush()
