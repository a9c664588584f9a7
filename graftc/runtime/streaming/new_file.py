"""Create the file into which folded rows are written: everything else in it is copied from the base's."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import BinaryIO

import torch

from graftc.files.tensors.headers import Shard, header_bytes
from graftc.files.tensors.mapped import DTYPES, MappedFile
from graftc.runtime.streaming.merge_plan import MergePlan

_CHUNK = 2**22
"""The number of bytes or entries to copy at a time."""
_RANGE = 2**30
"""The number of bytes to copy in one system call."""
_ELSEWHERE = frozenset({errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM})
"""Errors of the kernel's copy that say that it does not work between these files."""


def create_file(plan: MergePlan, shard: Shard, path: Path) -> None:
    """Create a file like the base's, or one with tensors in a wider dtype.

    Tensors of which the plan folds every row have no contents yet, unless they are in another dtype. The disk's space
    is reserved for them, so that writing to them in memory cannot fail.

    Args:
        plan: the merge.
        shard: the base's file.
        path: the file to create.

    Raises:
        OSError: if it cannot be written.
    """
    if any(plan.written(stored) != stored.dtype for stored in shard.tensors.values()):
        _create_wider(plan, shard, path)
    elif not hasattr(os, "posix_fallocate"):
        shutil.copyfile(shard.path, path)
    else:
        folded = {site.weight.tensor for site in plan.sites if site.weight.whole}
        with shard.path.open("rb") as source, path.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, shard.size)
            for start, end in _ranges(shard, folded):
                _copy(source, file, start, end)


def _create_wider(plan: MergePlan, shard: Shard, path: Path) -> None:
    tensors = shard.tensors.values()
    header = header_bytes(((t.name, plan.written(t), t.shape) for t in tensors), shard.metadata)
    with path.open("wb") as file:
        file.write(header)
        source = MappedFile(shard)
        for stored in tensors:
            values = source.tensor(stored).reshape(-1) if plan.written(stored) != stored.dtype else source.raw(stored)
            for start in range(0, values.numel(), _CHUNK):
                piece = values[start : start + _CHUNK]
                wide = piece.to(DTYPES[plan.written(stored)]) if piece.dtype != torch.uint8 else piece
                file.write(wide.contiguous().view(torch.uint8).numpy().data)


def _ranges(shard: Shard, without: Collection[str]) -> Iterator[tuple[int, int]]:
    """Yield the ranges of a file's bytes, including its header, that do not belong to the given tensors."""
    start = 0
    for stored in sorted((shard.tensors[name] for name in shard.tensors.keys() & without), key=lambda own: own.start):
        if start < stored.start:
            yield start, stored.start
        start = max(start, stored.end)
    if start < shard.size:
        yield start, shard.size


def _copy(source: BinaryIO, file: BinaryIO, start: int, end: int) -> None:
    """Copy a range of bytes to the same place of another file, in the kernel where that works."""
    at = start
    try:
        while hasattr(os, "copy_file_range") and at < end:
            count = min(end - at, _RANGE)
            copied = os.copy_file_range(source.fileno(), file.fileno(), count, offset_src=at, offset_dst=at)
            if not copied:
                break
            at += copied
    except OSError as error:
        if error.errno not in _ELSEWHERE:
            raise
    source.seek(at)
    file.seek(at)
    while at < end:
        data = source.read(min(end - at, _CHUNK))
        if not data:
            raise OSError(errno.EIO, "the file ends early", source.name)
        file.write(data)
        at += len(data)
