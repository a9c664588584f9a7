"""Find the files that contain a folder's weights: those that transformers loads, all within the folder. No torch.

A folder has ``model.safetensors``, or ``model.safetensors.index.json``, which maps each tensor to its file; if both
exist, the single file is read. A config may name another file of either kind as ``transformers_weights``. Names have to
lead to regular files in the folder itself, or to blobs in the hub's cache.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graftc.files.tensors.headers import is_tensor_name
from graftc.specs.regular_files import INDEX_BYTES, JSON_BYTES, read_regular
from graftc.specs.strict_json import read_json

_ADAPTER = "adapter_config.json"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_ENTRIES = 2**20
"""Maximum number of tensors in an index."""
_FILE_NAME = 255
"""Maximum length of a file's name in bytes, on all common file systems."""


class UnsafeFileError(ValueError):
    """Raised for a name that leads out of the folder."""


@dataclass(frozen=True)
class WeightFiles:
    """The files that contain a folder's weights.

    Attributes:
        names: the names of the files, sorted.
        index_name: the name of the index; None for a single file without an index.
        index: the contents of the index.
    """

    names: tuple[str, ...]
    index_name: str | None = None
    index: Mapping[str, Any] | None = None


def weight_files(folder: Path) -> WeightFiles | None:
    """Return the files from which transformers loads the weights of a folder; None if there are no safetensors.

    Raises:
        UnsafeFileError: if a name leads out of the folder, or to something that is not a regular file.
        ValueError: if the folder also contains an adapter, the index cannot be read, or files that it names are
            missing.
        OSError: if a file cannot be opened or read.
    """
    if (adapter := embedded_adapter(folder)) is not None:
        raise ValueError(f"it contains a model and {adapter}, which transformers would apply to it")
    name = _named(folder)
    if name is None:
        name = next((name for name in (SINGLE, INDEX) if _is_there(folder / name)), None)
    if name is None:
        return None
    if not name.endswith(".json"):
        _check_files(folder, [name])
        return WeightFiles((name,))
    index = _read_index(folder, name)
    names = tuple(sorted(set(index["weight_map"].values())))
    _check_files(folder, names)
    return WeightFiles(names, name, index)


def embedded_adapter(folder: Path) -> str | None:
    """Return the config of an adapter that transformers would apply to a folder's model; None if there is none."""
    return _ADAPTER if (folder / _ADAPTER).exists() and (folder / "config.json").exists() else None


def _is_there(path: Path) -> bool:
    """Return whether a file exists; links are followed only if that is safe."""
    if path.is_symlink() and not leads_inside(path):
        raise UnsafeFileError(f"{path} is a link that leads out of the folder")
    return path.is_file()


def _named(folder: Path) -> str | None:
    """Return the file that the config names; None if it names none."""
    path = folder / "config.json"
    if not path.is_file():
        return None
    raw = read_regular(path, JSON_BYTES)
    if b"transformers_weights" not in raw:
        return None
    config = read_json(raw, JSON_BYTES)
    name = config.get("transformers_weights") if isinstance(config, dict) else None
    if name is None:
        return None
    if not isinstance(name, str) or not _is_plain(name, (".safetensors", ".safetensors.index.json")):
        raise UnsafeFileError(
            f"the config of {folder} names a weight file that is not in the folder: {str(name)[:60]!r}"
        )
    if not _is_there(folder / name):
        raise ValueError(f"the config names {name}, which does not exist")
    return name


def _read_index(folder: Path, name: str) -> dict[str, Any]:
    path = folder / name
    if path.is_symlink() and not leads_inside(path):
        raise UnsafeFileError(f"{path} is a link that leads out of the folder")
    try:
        data: Any = read_json(read_regular(path, INDEX_BYTES), INDEX_BYTES, values=_ENTRIES)
    except (OSError, ValueError) as error:
        raise ValueError(f"{name} is not plain JSON: {error}") from error
    table = data.get("weight_map") if isinstance(data, dict) else None
    if not isinstance(table, dict) or not table or not all(isinstance(v, str) for v in table.values()):
        raise ValueError(f"{name} has no weight_map of names")
    if not isinstance(data.get("metadata"), dict):
        raise ValueError(f"{name} has no metadata, which transformers requires")
    if long := next((tensor for tensor in table if not is_tensor_name(tensor)), None):
        raise ValueError(f"{name} contains a tensor name that is too long: {long[:60]!r}...")
    if unsafe := sorted({file for file in table.values() if not _is_plain(file)}):
        more = f", and {len(unsafe) - 1} more" if unsafe[1:] else ""
        raise UnsafeFileError(f"{name} of {folder} names files that are not in the folder: {_shown(unsafe[0])}{more}")
    index: dict[str, Any] = data
    return index


def _shown(name: str) -> str:
    return repr(name) if len(name) <= 100 else f"{name[:100]!r}..."


def _is_plain(name: str, endings: tuple[str, ...] = (".safetensors",)) -> bool:
    """Return whether a name refers to a file in the folder itself."""
    strange = any(character in name for character in "/\\:") or not name.isprintable()
    short = len(name.encode("utf-8", "surrogatepass")) <= _FILE_NAME
    return short and not strange and name not in endings and name.endswith(endings)


def leads_inside(path: Path) -> bool:
    """Return whether a link leads to a file of the same folder or, in the hub's cache, to one of its blobs."""
    target, folder = Path(os.path.realpath(path)), Path(os.path.realpath(path.parent))  # these tolerate circular links
    cached = folder.parent.name == "snapshots" and target.parent == folder.parent.parent / "blobs"
    return target.parent == folder or cached


def _check_files(folder: Path, names: Iterable[str]) -> None:
    missing = []
    for name in names:
        if not _is_there(folder / name):
            what = "is not a regular file" if (folder / name).exists() else "is missing"
            missing.append(f"{name} {what}")
    if missing:
        raise ValueError(*missing)
