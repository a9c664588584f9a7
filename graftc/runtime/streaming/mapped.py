"""Tensors of a file in their place: mapped into memory, so that the system reads and writes what is looked at."""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor

from graftc.runtime.streaming.shards import Checkpoint, Shard, StoredTensor, read_shard

__all__ = ["DTYPES", "FORMAT_NAMES", "MappedFile", "MappedTensors", "StoredTensors"]

DTYPES: Mapping[str, torch.dtype] = MappingProxyType(
    {
        **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
        **{"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8},
        **{"U8": torch.uint8, "BOOL": torch.bool, "C64": torch.complex64},
    }
)
"""Element types of the format that torch computes with."""
FORMAT_NAMES: Mapping[torch.dtype, str] = MappingProxyType({dtype: name for name, dtype in DTYPES.items()})


class MappedFile:
    """A file in memory.

    Args:
        path: the file.
        writable: writing to tensors changes the file; otherwise it changes private copies, and nobody should.

    Raises:
        OSError: it cannot be opened.
    """

    def __init__(self, path: Path, *, writable: bool = False) -> None:
        access = mmap.ACCESS_WRITE if writable else mmap.ACCESS_COPY
        with path.open("r+b" if writable else "rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=access)

    def tensor(self, stored: StoredTensor) -> Tensor:
        """A tensor where it lies."""
        dtype = DTYPES[stored.dtype]
        return self.raw(stored).view(dtype).view(stored.shape) if stored.end > stored.start else _empty(stored)

    def raw(self, stored: StoredTensor) -> Tensor:
        """Its bytes, ``uint8``."""
        count = stored.end - stored.start
        if not count:
            return torch.empty(0, dtype=torch.uint8)
        return torch.frombuffer(self._map, dtype=torch.uint8, count=count, offset=stored.start)

    def flush(self) -> None:
        """What was written, onto the disk."""
        self._map.flush()


def _empty(stored: StoredTensor) -> Tensor:
    return torch.empty(stored.shape, dtype=DTYPES[stored.dtype])


class MappedTensors(Mapping[str, Tensor]):
    """The tensors of a file by name, each where it lies.

    Args:
        path: a safetensors file.

    Raises:
        ValueError: it is none; OSError.
    """

    def __init__(self, path: Path) -> None:
        self.shard: Shard = read_shard(path)
        self._file = MappedFile(path)

    def __getitem__(self, name: str) -> Tensor:
        return self._file.tensor(self.shard.tensors[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self.shard.tensors)

    def __len__(self) -> int:
        return len(self.shard.tensors)


class StoredTensors:
    """The tensors of a checkpoint by name, whichever file they are in. Files are opened when they are needed.

    Args:
        checkpoint: the files.
        writable: see `MappedFile`.
    """

    def __init__(self, checkpoint: Checkpoint, *, writable: bool = False) -> None:
        self.entries = checkpoint.tensors()
        self._shards = checkpoint.shard_of()
        self._files: dict[str, MappedFile] = {}
        self._writable = writable

    def stored(self, name: str) -> Tensor:
        """A tensor where it lies."""
        return self._file(name).tensor(self.entries[name])

    def raw(self, name: str) -> Tensor:
        """Its bytes."""
        return self._file(name).raw(self.entries[name])

    def _file(self, name: str) -> MappedFile:
        shard = self._shards[name]
        if shard.name not in self._files:
            self._files[shard.name] = MappedFile(shard.path, writable=self._writable)
        return self._files[shard.name]

    def release(self) -> None:
        """Let all files go; what was written to them is on the disk."""
        for file in self._files.values() if self._writable else ():
            file.flush()
        self._files.clear()
