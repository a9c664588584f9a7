"""Checkpoints as files: the safetensors files of a folder, checked before anything in them is used. No torch.

A folder has ``model.safetensors``, or ``model.safetensors.index.json``, which says in which file each tensor is. Names
lead to plain files of the folder itself, and headers describe every byte of their file exactly once.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from graftc.specs.errors.diagnostics import GraftError
from graftc.specs.strict_json import read_json

__all__ = [
    "INDEX",
    "ITEM_SIZES",
    "SINGLE",
    "Checkpoint",
    "Shard",
    "StoredTensor",
    "header_bytes",
    "leads_inside",
    "read_checkpoint",
    "read_shard",
]

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
HEADER_BYTES, INDEX_BYTES = 100_000_000, 2**28
"""What a header and an index may have; the first is the format's own limit."""

ITEM_SIZES: Mapping[str, int] = MappingProxyType(
    {
        **{"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1},
        **{"U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1, "C64": 8},
        **{"F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "F8_E4M3FNUZ": 1, "F8_E5M2FNUZ": 1},
    }
)
"""Element types of the format whose elements are whole bytes."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file.

    Attributes:
        name: its name in the file.
        dtype: its element type, as the format writes it: ``BF16``.
        shape: its sizes.
        start, end: its bytes, counted from the start of the file.
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
    """One file.

    Attributes:
        path: the file.
        size: of it, in bytes.
        metadata: what its header says beside tensors.
        tensors: by name, in the order in which they lie.
    """

    path: Path
    size: int
    metadata: Mapping[str, str]
    tensors: Mapping[str, StoredTensor]

    @property
    def name(self) -> str:
        """The file's name."""
        return self.path.name


@dataclass(frozen=True)
class Checkpoint:
    """The weights of a folder.

    Attributes:
        path: the folder.
        shards: its files, in the order of their names.
        index: what the index file says; None where there is one file without an index.
    """

    path: Path
    shards: tuple[Shard, ...]
    index: Mapping[str, Any] | None

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(shard.size for shard in self.shards)

    def tensors(self) -> dict[str, StoredTensor]:
        """Every tensor by its name."""
        return {name: tensor for shard in self.shards for name, tensor in shard.tensors.items()}

    def shard_of(self) -> dict[str, Shard]:
        """The file that each tensor is in."""
        return {name: shard for shard in self.shards for name in shard.tensors}


def read_checkpoint(folder: Path) -> Checkpoint:
    """The headers of a folder's files.

    Raises:
        GraftError: GC100 where files are missing or damaged, all of them at once; GC101 where names lead out of the
            folder, or to something that is no plain file.
    """
    if not folder.is_dir():
        raise GraftError("GC100", f"{folder} is no folder", hint="give the folder of a transformers model")
    index = _index(folder)
    if index is None:
        if not (folder / SINGLE).is_file():
            raise GraftError("GC100", f"{folder} has neither {SINGLE} nor {INDEX}", hint=_no_weights(folder))
        names = [SINGLE]
    else:
        names = sorted(set(index["weight_map"].values()))
    _check_files(folder, names)
    shards, damage = [], []
    for name in names:
        try:
            shards.append(read_shard(folder / name))
        except (OSError, ValueError) as error:
            damage.append(f"{name}: {error}")
    if damage:
        raise _damaged(folder, damage)
    found = Checkpoint(folder, tuple(shards), index)
    if wrong := list(_against_index(found)):
        raise _damaged(folder, wrong)
    return found


def _no_weights(folder: Path) -> str:
    if any(folder.glob("*.bin")):
        return "its weights are pickles (.bin), which are not read: save the model again, as safetensors"
    return "give the folder of a transformers model that is stored as safetensors"


def _index(folder: Path) -> dict[str, Any] | None:
    """The index as data; None where there is none."""
    path = folder / INDEX
    if path.is_symlink() and not leads_inside(path):
        raise GraftError("GC101", f"{path} is a link that leads out of the folder")
    if not path.is_file():
        return None
    try:
        with path.open("rb") as file:
            data: Any = read_json(file.read(INDEX_BYTES + 1), INDEX_BYTES)
    except (OSError, ValueError) as error:
        raise _damaged(folder, [f"{INDEX} is no plain JSON: {error}"]) from error
    table = data.get("weight_map") if isinstance(data, dict) else None
    if not isinstance(table, dict) or not table or not all(isinstance(v, str) for v in table.values()):
        raise _damaged(folder, [f"{INDEX} has no weight_map of names"])
    if unsafe := sorted({file for file in table.values() if not _is_plain(file)}):
        message = f"{INDEX} of {folder} names files that are not in the folder: {unsafe[0]!r}"
        raise GraftError("GC101", message, details=[f"also {name!r}" for name in unsafe[1:10]])
    found: dict[str, Any] = data
    return found


def _is_plain(name: str) -> bool:
    """Whether a name is that of a file in the folder itself."""
    strange = any(character in name for character in "/\\:") or not name.isprintable()
    return bool(name) and not strange and name not in (".", "..") and name.endswith(".safetensors")


def leads_inside(path: Path) -> bool:
    """Whether a link leads to a file of the same folder, or, in the cache of the hub, to one of its blobs."""
    target, folder = path.resolve(), path.parent.resolve()
    cached = folder.parent.name == "snapshots" and target.parent == folder.parent.parent / "blobs"
    return target.parent == folder or cached


def _check_files(folder: Path, names: Iterable[str]) -> None:
    missing = []
    for name in names:
        path = folder / name
        if path.is_symlink() and not leads_inside(path):
            raise GraftError("GC101", f"{path} is a link that leads out of the folder")
        if not path.is_file():
            missing.append(name)
    if missing:
        count = "1 file" if len(missing) == 1 else f"{len(missing)} files"
        message = f"{folder} lacks {count} that its index names: {missing[0]}"
        raise GraftError("GC100", message, hint="download the whole checkpoint again", details=missing[1:])


def read_shard(path: Path) -> Shard:
    """The header of a file.

    Raises:
        ValueError: it is no safetensors file, or what it describes is not what the file has; OSError.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(HEADER_BYTES, size - 8):
            raise ValueError("is no safetensors file, or is cut off in its header")
        data = read_json(file.read(length), HEADER_BYTES)
    if not isinstance(data, dict):
        raise ValueError("has a header that is no table")
    metadata = data.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("has metadata that is no text")
    tensors = sorted((_tensor(name, entry, 8 + length) for name, entry in data.items()), key=lambda t: (t.start, t.end))
    at = 8 + length
    for tensor in tensors:
        if tensor.start != at:
            raise ValueError(f"{tensor.name} does not begin where the tensor before it ends")
        at = tensor.end
    if at != size:
        what = "is cut off" if at > size else "has more at its end than its header says"
        raise ValueError(f"{what}: it has {size} bytes, not {at}")
    return Shard(path, size, metadata, {tensor.name: tensor for tensor in tensors})


def _tensor(name: str, entry: Any, offset: int) -> StoredTensor:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{name!r} is not described as a tensor")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if dtype not in ITEM_SIZES:
        raise ValueError(f"{name!r} is of the unknown type {dtype!r}")
    for numbers in (shape, offsets):
        if not isinstance(numbers, list) or not all(type(n) is int and n >= 0 for n in numbers):
            raise ValueError(f"{name!r} has sizes that are no whole numbers")
    if len(offsets) != 2 or offsets[1] - offsets[0] != math.prod(shape) * ITEM_SIZES[dtype]:
        raise ValueError(f"{name!r} has another number of bytes than its sizes give")
    return StoredTensor(name, dtype, tuple(shape), offset + offsets[0], offset + offsets[1])


def _against_index(found: Checkpoint) -> Iterable[str]:
    """What is not as the index says, and names that stand in two files."""
    places: dict[str, str] = {}
    for shard in found.shards:
        for name in shard.tensors:
            if name in places:
                yield f"{name} is in {places[name]} and in {shard.name}"
            places[name] = shard.name
    table: Mapping[str, str] = found.index["weight_map"] if found.index is not None else places
    for name, file in table.items():
        if places.get(name) != file:
            yield f"{name} is not in {file}, as the index says"
    for name in places.keys() - table.keys():
        yield f"{name} is not in the index"


def _damaged(folder: Path, damage: list[str]) -> GraftError:
    more = [f"... and {len(damage) - 10} more"] if len(damage) > 10 else []
    message = f"{folder} is damaged: {damage[0]}"
    return GraftError("GC100", message, hint="download the checkpoint again", details=[*damage[1:10], *more])


def header_bytes(tensors: Iterable[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str]) -> bytes:
    """The start of a safetensors file, up to the first tensor.

    Args:
        tensors: name, element type and sizes, in the order in which they are to lie.
        metadata: what the header says beside them.
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
